// How a workspace is divided. The same at every level, as its size is asked before the level is known.
#pragma once

#include "common.h"
#include "rounded.h"

namespace ARRIERO_LEVEL {

constexpr int64_t PIECE_BYTES = 256 * 64 * 4;  // one part's scratch for unpacked weights

// Hands out 64-byte aligned pieces from `base`; from null it only counts.
class Carver {
   public:
    explicit Carver(void* base) : base_(static_cast<uint8_t*>(base)) {}

    template <class T>
    T* take(int64_t count) {
        const int64_t at = bytes_;
        bytes_ = round_up(at + count * static_cast<int64_t>(sizeof(T)), 64);
        return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
    }

    Rounded take_rounded(int64_t rows, int64_t features, int64_t block) {
        Rounded out{nullptr, nullptr, nullptr, features, block};
        out.values = take<int8_t>(rows * features);
        out.scales = take<float>(rows * out.blocks());
        out.corrections = take<int32_t>(rows * out.blocks() * out.runs(SHORTEST_RUN));
        return out;
    }

    int64_t bytes() const { return bytes_; }

   private:
    uint8_t* base_;
    int64_t bytes_ = 0;
};

struct LinearWorkspace {
    static constexpr int64_t TOKENS = 64;  // rounded twice, whose products lie side by side until they are added

    Rounded rounded{};  // [T], or of each token two rows: what it is rounded to, and what that leaves
    float* left = nullptr;      // of a token, one part's own: [K]
    float* products = nullptr;  // of TOKENS: [2 TOKENS, N]
    uint8_t* pieces = nullptr;  // [parts, PIECE_BYTES]
    int64_t bytes;

    LinearWorkspace(void* base, int64_t format, int64_t block, int64_t T, int64_t N, int64_t K, int64_t part,
                    int64_t parts) {
        Carver carver(base);
        if (is_twice(format)) {
            rounded = carver.take_rounded(2 * T, K, block);
            left = carver.take<float>(parts * K) + (base ? part * K : 0);
            products = carver.take<float>(2 * smaller(T, TOKENS) * N);
        } else if (is_integer(format)) {
            rounded = carver.take_rounded(T, K, block);
        } else {
            pieces = carver.take<uint8_t>(parts * PIECE_BYTES);
        }
        bytes = carver.bytes();
    }
};

// A row is one (token, choice) pair: row t * R + r.
struct DispatchWorkspace {
    int64_t* start;  // [E + 2]: rows of expert e are order[start[e] .. start[e + 1]); of no expert, those of e = E
    int64_t* order;  // [T * R]
    float* scaled = nullptr;  // score * x, [rows, H], or:
    Rounded rounded{};        // the same, rounded
    int64_t wide;             // row length of `products`
    float* products;          // what a projection gave, before it is combined: [rows, wide]
    float* inner;             // silu(gate) * up, [rows, F]
    Rounded inner_rounded{};  // the same, rounded, if down is in integers
    uint8_t* pieces;          // [parts, PIECE_BYTES]
    int64_t bytes;

    DispatchWorkspace(void* base, int64_t gate_up_format, int64_t gate_up_block, int64_t down_format,
                      int64_t down_block, int64_t T, int64_t R, int64_t E, int64_t H, int64_t F, int64_t parts) {
        Carver carver(base);
        const int64_t rows = T * R;
        start = carver.take<int64_t>(E + 2);
        order = carver.take<int64_t>(rows);
        if (is_integer(gate_up_format)) {
            rounded = carver.take_rounded(rows, H, gate_up_block);
        } else {
            scaled = carver.take<float>(rows * H);
        }
        wide = 2 * round_up(F, 16) > H ? 2 * round_up(F, 16) : H;
        products = carver.take<float>(rows * wide);
        inner = carver.take<float>(rows * F);
        if (is_integer(down_format)) inner_rounded = carver.take_rounded(rows, F, down_block);
        pieces = carver.take<uint8_t>(parts * PIECE_BYTES);
        bytes = carver.bytes();
    }
};

struct AttentionWorkspace {
    static constexpr int64_t KEYS = 64;         // keys looked at together
    static constexpr int64_t SPAN = 1024;       // keys of a row that one thread sums in decode
    static constexpr int64_t TOGETHER = 8;      // query heads of one key head that look at a key together in decode
    static constexpr int64_t ROWS_WANTED = 96;  // (query, head) rows of a prompt that share one look at the keys
};

// Of prompts. A row is one (query, head) pair.
struct PromptWorkspace {
    int64_t queries;  // queries of one block
    int64_t rows;     // and the rows they make
    // one part's own: [rows, D], [rows, KEYS], [rows, D], [rows], [rows], [D, KEYS], which is filled 64 features at a
    // time, and [KEYS, D]
    float *asked, *scores, *sums, *most, *total, *piece, *values;
    int64_t bytes;  // of one part

    PromptWorkspace(void* base, int64_t part, int64_t T, int64_t Q, int64_t G, int64_t D) {
        const int64_t heads = Q / G, wanted = AttentionWorkspace::ROWS_WANTED;
        queries = smaller(T, heads < wanted ? wanted / heads : 1);
        rows = queries * heads;
        divide(nullptr, D);
        if (base) divide(static_cast<uint8_t*>(base) + part * bytes, D);
    }

   private:
    void divide(void* base, int64_t D) {
        Carver carver(base);
        asked = carver.take<float>(rows * D);
        scores = carver.take<float>(rows * AttentionWorkspace::KEYS);
        sums = carver.take<float>(rows * D);
        most = carver.take<float>(rows);
        total = carver.take<float>(rows);
        piece = carver.take<float>(round_up(D, 64) * AttentionWorkspace::KEYS);
        values = carver.take<float>(AttentionWorkspace::KEYS * D);
        bytes = carver.bytes();
    }
};

// The same of sequences of L tokens that all see one another; D is any size, and rows lie as far apart as LANES make it.
inline PromptWorkspace full_workspace(void* base, int64_t part, int64_t L, int64_t D) {
    return PromptWorkspace(base, part, L, 1, 1, round_up(D, 16));
}

// Of one token per row.
struct DecodeWorkspace {
    int64_t spans;                     // of a row whose cache is full
    float *outcomes, *highest, *total;  // of each row's and head's spans: [B, Q, spans, D], [B, Q, spans] twice
    // one part's own: [TOGETHER, D], [TOGETHER, SPAN], [TOGETHER, D]
    float *asked, *scores, *sums;
    float* scaled;     // and of int8 codes: scores of one row [SPAN], rounded queries [TOGETHER, round_up(D, 32)], and
    int16_t* words;    // rounded weights [TOGETHER, SPAN]
    int16_t* weights;
    int64_t bytes;     // of all parts

    DecodeWorkspace(void* base, int64_t part, int64_t B, int64_t Q, int64_t C, int64_t D, int64_t parts) {
        constexpr int64_t SPAN = AttentionWorkspace::SPAN, TOGETHER = AttentionWorkspace::TOGETHER;
        Carver carver(base);
        spans = (C + SPAN - 1) / SPAN;
        outcomes = carver.take<float>(B * Q * spans * D);
        highest = carver.take<float>(B * Q * spans);
        total = carver.take<float>(B * Q * spans);
        for (int64_t one = 0; one < parts; ++one) {
            if (one > part && base) break;
            asked = carver.take<float>(TOGETHER * D);
            scores = carver.take<float>(TOGETHER * SPAN);
            sums = carver.take<float>(TOGETHER * D);
            scaled = carver.take<float>(SPAN);
            words = carver.take<int16_t>(TOGETHER * round_up(D, 32));
            weights = carver.take<int16_t>(TOGETHER * SPAN);
        }
        bytes = carver.bytes();
    }
};

// Where the parts of prompts lie: behind those of rows of one token.
inline int64_t prompts_at(int64_t B, int64_t Q, int64_t C, int64_t D, int64_t parts) {
    return DecodeWorkspace(nullptr, 0, B, Q, C, D, parts).bytes;
}

inline int64_t attention_bytes(int64_t B, int64_t T, int64_t Q, int64_t G, int64_t C, int64_t D, int64_t parts) {
    return prompts_at(B, Q, C, D, parts) + PromptWorkspace(nullptr, 0, T, Q, G, D).bytes * parts;
}

}  // namespace ARRIERO_LEVEL
