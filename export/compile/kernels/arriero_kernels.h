/* The C ABI of Arriero's CPU kernels: linear layers, expert dispatch, attention over an in-place key/value cache.
 *
 * Every array is dense and row-major, activations are float32, every scalar is int64_t. No function allocates, starts a
 * thread or keeps state: the caller gives a workspace (64-byte aligned, contents unimportant) and runs `parts` calls
 * that differ in `part` (0 .. parts-1), in any order or at the same time. Each call does its part of the work. Where a
 * layer takes several functions, all parts of one must have returned before any part of the next starts, and all get
 * the same workspace and the same sizes. `parts` = number of threads is best; any parts >= 1 is right. Results do not
 * depend on `parts`. Functions give 0.
 *
 * The instruction set is chosen at the first call by what the CPU has (see arriero_level).
 *
 * Legend: T tokens, N output features, K input features, E experts, R experts per token, H hidden, F expert width,
 * B rows of a cache, Q query heads, G key/value heads, D head size, C slots of a cache buffer.
 *
 * --- Weight formats ---------------------------------------------------------------------------------------------
 * ARRIERO_F32, ARRIERO_BF16, ARRIERO_F16: the checkpoint's own bytes, of any alignment. A linear layer's matrix is
 *   [N,K]; an expert's is [K,N] (input-major), where gate_up has N = 2F, halves gate | up. Scales are not read (a pointer
 *   may be null), `block` is 0. Values are widened exactly; sums are float32.
 * ARRIERO_INT8, ARRIERO_INT4: symmetric integers, one float32 scale per output feature and `block` input features
 *   (a multiple of 16 that divides K; K itself is one scale per output); ARRIERO_INT8_F16, ARRIERO_INT4_F16: the same
 *   with float16 scales. Activations are rounded to int8 per token and
 *   block: scale = absmax / 127, q = rint(x * (127 / absmax)); a block whose absmax is below 1e-30 counts as zeros.
 *   Products and their sum over a block are exact int32. A linear layer's format plus ARRIERO_TWICE rounds what this
 *   leaves of an activation once more, with a scale of its own, and multiplies it too: 15 bits of the block's absmax.
 * ARRIERO_GRID4_F16: as ARRIERO_INT4_F16, but a code is the number of one of the 16 integers of GRID4 (see grids.h);
 *   ARRIERO_GRID3_F16 and ARRIERO_GRID2_F16: of 8 and of 4.
 * ARRIERO_E4M3: OCP FP8 E4M3 (no NaN codes) with one float32 scale per output feature, `block` is 0; activations stay
 *   float32.
 *
 * Integers and E4M3 are stored in panels of 16 output features (the last panel padded with zero weights); P = ceil(N/16):
 *   INT8   u8 [P, K/4, 16, 4]   offset binary (q + 128): 4 neighbouring input features of each of the 16 outputs
 *   INT4   u8 [P, K/8, 16, 4]   offset binary (q + 8): byte b of an output holds input features b (low nibble) and
 *                               b + 4 (high nibble) of its 8; GRID4's numbers lie so too
 *   GRID2  u8 [P, K/16, 64]     byte 4 n + b of output n holds input features b + 8, b, b + 12 and b + 4 of its 16, two
 *                               bits each, the lowest first
 *   GRID3  u8 [P, K/16, 96]     the lower two bits so; then 32 bytes: bit q of nibble 4 n + b is the third bit of input
 *                               feature b + 4 q of output n. Byte i holds nibbles i (low) and i + 32 (high)
 *   E4M3   u8 [P, K, 16]
 *   scales f32 or f16 [P, K/block, 16] (E4M3: f32 [P, 16]), zero in padding.
 * An expert's gate_up panels alternate, gate 0, up 0, gate 1, up 1, ..: [2*ceil(F/16), ..].
 * arriero.graphs.stored.packed_panels packs them.
 *
 * An expert is one record, at a multiple of 64 bytes: its gate_up, the scales of that, its down, the scales of that, each
 * at an offset that is the same for all experts of a layer (arriero.graphs.stored.expert_record lays them out).
 */
#ifndef ARRIERO_KERNELS_H
#define ARRIERO_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { ARRIERO_F32 = 0, ARRIERO_BF16 = 1, ARRIERO_F16 = 2, ARRIERO_E4M3 = 3, ARRIERO_INT8 = 4, ARRIERO_INT4 = 5 };
enum { ARRIERO_CODES = 6 }; /* of a key/value cache alone */
enum { ARRIERO_INT8_F16 = 7, ARRIERO_INT4_F16 = 8, ARRIERO_GRID4_F16 = 9 };
enum { ARRIERO_GRID3_F16 = 10, ARRIERO_GRID2_F16 = 11 };
enum { ARRIERO_TWICE = 64 }; /* of integers, in a linear layer */

/* The instruction set in use: "amx", "avx512vnni", "avx2", "i8mm", "dotprod", "neon" or "scalar". */
const char* arriero_level(void);

/* Use the named instruction set from now on. Gives 0, or 1 (and changes nothing) if this CPU or build lacks it. For
 * tests and measurements; not while another kernel runs. */
int32_t arriero_use_level(const char* name);

/* --- Linear: y[T,N] = x[T,K] W^T ---------------------------------------------------------------------------------
 * Two steps: arriero_linear_prepare (rounds the activations; does nothing for exact formats and E4M3, where it may be
 * left out), then arriero_linear. */

/* Bytes of workspace of one linear layer. */
int64_t arriero_linear_workspace(int64_t format, int64_t block, int64_t T, int64_t N, int64_t K, int64_t parts);

int32_t arriero_linear_prepare(int64_t format, int64_t block, const float* x, int64_t T, int64_t K, void* workspace,
                               int64_t part, int64_t parts);

int32_t arriero_linear(int64_t format, int64_t block, const float* x, const void* weight, const void* scales, float* y,
                       int64_t T, int64_t N, int64_t K, void* workspace, int64_t part, int64_t parts);

/* --- Expert dispatch: y[t] = sum_r down_e(silu(gate_e(s x[t])) * up_e(s x[t])), e = expert_id[t,r], s = score[t,r] ---
 * Four steps: prepare, gate_up, down, sum. x [T,H], expert_id [T,R], score [T,R], y [T,H] (every element is written).
 * `records` [E] says where each expert's record lies, `at` where in it the matrix is, `scales_at` its scales. An expert
 * whose record is null is left out, and so are rows outside `first` .. end - 1, counted in the order of their experts, an
 * expert's in the order in which they come: T * R in all. So gate_up and down may be run several times, each row in one
 * pair of them, in any order, before sum. Weights of experts that no token is routed to are not touched. An id outside 0 .. E-1 adds
 * nothing. Where down is in integers, gate_up is cut into parts at multiples of its block, so a block of F leaves it to
 * one thread. */

/* Bytes of workspace of one dispatch. */
int64_t arriero_dispatch_workspace(int64_t gate_up_format, int64_t gate_up_block, int64_t down_format,
                                   int64_t down_block, int64_t T, int64_t R, int64_t E, int64_t H, int64_t F,
                                   int64_t parts);

/* Groups the tokens by expert, scales them by their scores, and rounds them if gate_up is in integers. */
int32_t arriero_dispatch_prepare(int64_t gate_up_format, int64_t gate_up_block, int64_t down_format, int64_t down_block,
                                 const float* x, const int64_t* expert_id, const float* score, int64_t T, int64_t R,
                                 int64_t E, int64_t H, int64_t F, void* workspace, int64_t part, int64_t parts);

/* silu(gate) * up of every row routed to one of `records`, into the workspace. */
int32_t arriero_dispatch_gate_up(int64_t gate_up_format, int64_t gate_up_block, int64_t down_format, int64_t down_block,
                                 const void* const* records, int64_t first, int64_t end, int64_t at,
                                 int64_t scales_at, int64_t T, int64_t R, int64_t E, int64_t H, int64_t F,
                                 void* workspace, int64_t part, int64_t parts);

/* The down projections of the same rows, into the workspace, or into y where a token has one expert. */
int32_t arriero_dispatch_down(int64_t gate_up_format, int64_t gate_up_block, int64_t down_format, int64_t down_block,
                              const void* const* records, int64_t first, int64_t end, int64_t at, int64_t scales_at,
                              float* y, int64_t T, int64_t R, int64_t E, int64_t H, int64_t F, void* workspace,
                              int64_t part, int64_t parts);

/* Their sums over each token's experts, into y. Part p needs part p of down alone, not all of them. */
int32_t arriero_dispatch_sum(int64_t gate_up_format, int64_t gate_up_block, int64_t down_format, int64_t down_block,
                             float* y, int64_t T, int64_t R, int64_t E, int64_t H, int64_t F, void* workspace,
                             int64_t part, int64_t parts);

/* --- Attention with an in-place key/value cache --------------------------------------------------------------------
 * The T new tokens of all rows lie one after another: row b's are starts[b] .. starts[b + 1] - 1, of starts int64 [B+1]
 * with starts[0] = 0 and starts[B] = T; a row may have none. q [T,Q*D], k and v [T,G*D] (rotated, normalised, tempered),
 * positions int64 [T], key_cache and value_cache [B,G,C,D], out [T,Q*D]. Query head h reads key/value head h / (Q/G); the
 * scale is D**-0.5. D is a multiple of 16, at most 256.
 * The caches' `format`: ARRIERO_F32, ARRIERO_F16 (rounded to nearest), or ARRIERO_CODES: int8, where a number x is kept
 * as clip(rint(x / step), -128, 127) with the step of its head and channel in key_steps and value_steps, float32 [G,D].
 * In the other formats these are not read. A token sees its own key and value as they are kept.
 * `chunk` is 0 for global layers, else the attention chunk: the token at position p lies in slot p (global) or
 * p % chunk. A row's positions count up by one; its tokens stay within one chunk, and the last one's slot is below C. So
 * a query in slot i sees the slots 0 .. i: the runtime's cache holds the row's current chunk (or all of it) from slot 0
 * on. A row's outcome does not depend on the other rows. Three steps: arriero_cache_write, arriero_attention,
 * arriero_attention_merge; the last is for rows of one token. */

/* Puts the new keys and values in their slots; touches no other slot. */
int32_t arriero_cache_write(int64_t format, const float* k, const float* v, const int64_t* positions,
                            const int64_t* starts, const float* key_steps, const float* value_steps, void* key_cache,
                            void* value_cache, int64_t B, int64_t G, int64_t C, int64_t D, int64_t chunk, int64_t part,
                            int64_t parts);

/* Bytes of workspace of one attention. */
int64_t arriero_attention_workspace(int64_t B, int64_t T, int64_t Q, int64_t G, int64_t C, int64_t D, int64_t parts);

int32_t arriero_attention(int64_t format, const float* q, const int64_t* positions, const int64_t* starts,
                          const void* key_cache, const void* value_cache, const float* key_steps,
                          const float* value_steps, float* out, int64_t B, int64_t T, int64_t Q, int64_t G, int64_t C,
                          int64_t D, int64_t chunk, void* workspace, int64_t part, int64_t parts);

/* The outcome of rows whose keys were summed in several spans. */
int32_t arriero_attention_merge(const int64_t* positions, const int64_t* starts, const float* value_steps, float* out,
                                int64_t B, int64_t Q, int64_t G, int64_t C, int64_t D, int64_t chunk, void* workspace,
                                int64_t part, int64_t parts);

/* --- Attention without a cache --------------------------------------------------------------------------------------
 * softmax(q k^T D**-0.5) v within each of B sequences of L tokens (the heads of a picture's tiles), which all see one
 * another. q, k, v and out [B,L,D]; D is any size. */

/* Bytes of workspace of one such attention. */
int64_t arriero_full_attention_workspace(int64_t L, int64_t D, int64_t parts);

int32_t arriero_full_attention(const float* q, const float* k, const float* v, float* out, int64_t B, int64_t L,
                               int64_t D, void* workspace, int64_t part, int64_t parts);

/* --- Whole operators, as a graph compiled by TVM calls them ---------------------------------------------------------
 * Each takes its workspace from TVM's runtime and runs all its steps, in `parts`, in one launch of the calling thread's
 * workers. Only where TVM's runtime is loaded. They give 0, or -1 if it refuses. */

int32_t arriero_run_linear(int64_t format, int64_t block, const float* x, const void* weight, const void* scales,
                           float* y, int64_t T, int64_t N, int64_t K, int64_t parts);

/* `experts` i64 [1 + E] is the table of a layer's experts: first the address of its cache, of the library's own making
 * (see expert_cache.h), or 0, then those of the records. With a cache the records' places are not read: it says which are
 * in memory, and the dispatch computes them in the order in which they come. `at` [4]: gate_up, its scales, down, its
 * scales. Also -1 where a record cannot be read. */
int32_t arriero_run_dispatch(int64_t gate_up_format, int64_t gate_up_block, int64_t down_format, int64_t down_block,
                             int64_t gate_up_at, int64_t gate_up_scales_at, int64_t down_at, int64_t down_scales_at,
                             const float* x, const int64_t* expert_id, const float* score, const int64_t* experts,
                             float* y, int64_t T, int64_t R, int64_t E, int64_t H, int64_t F, int64_t parts);

/* Starts to read those of a layer's experts that its cache lacks, for the dispatch of the same ids that follows; with no
 * cache, nothing is to be done. `requested` [T,R] becomes a copy of the ids: so that graphs say what comes first. */
int32_t arriero_run_request(const int64_t* expert_id, const int64_t* experts, int64_t* requested, int64_t T, int64_t R);

/* `wanted` [W] are the tokens whose outcome is read; none means all. Of a row alone, what others have is left as it was. */
int32_t arriero_run_attention(int64_t format, const float* q, const float* k, const float* v, const int64_t* positions,
                              const int64_t* starts, void* key_cache, void* value_cache, const float* key_steps,
                              const float* value_steps, const int64_t* wanted, float* out, int64_t B, int64_t T,
                              int64_t Q, int64_t G, int64_t C, int64_t D, int64_t chunk, int64_t W, int64_t parts);

int32_t arriero_run_full_attention(const float* q, const float* k, const float* v, float* out, int64_t B, int64_t L,
                                   int64_t D, int64_t parts);

/* The change of a linear layer by LoRA adapters: out[t] = y[t] + B_i A_i x[t], i = adapter[b] of the row b that token t
 * is of, by `starts` as in attention. x [T,K], y and out [T,N], adapter int64 [rows], a stack A [adapters,R,K] and a
 * stack B [adapters,N,R] in float32. Row b is left as it is where i is 0 or no adapter's number. */
int32_t arriero_run_add_lora(const float* x, const float* y, const int64_t* adapter, const int64_t* starts,
                             const float* a, const float* b, float* out, int64_t rows, int64_t T, int64_t N, int64_t K,
                             int64_t R, int64_t adapters, int64_t parts);

#ifdef __cplusplus
}
#endif

#endif
