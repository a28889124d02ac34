// Llama 4's expert dispatch as two operators for NVIDIA GPUs, each of which is exactly one kernel.
//
//   ExpertGateUp(x, expert_id, score, gate_up, scales) -> inner    inner[t*k+j] = silu(gate_e(s x[t])) * up_e(s x[t])
//   ExpertDown(inner, expert_id, down, scales) -> y                y[t] = sum_j down_e(inner[t*k+j])
//
// with e = expert_id[t,j] and s = score[t,j]: the score scales the expert's INPUT. As both products are linear, the
// kernels multiply the float32 sums by s, before SwiGLU, which rounds less than scaling x and is the same function.
// In float16, inner is stored as a sixteenth of what it is (operators.h: INNER_SCALE), which ExpertDown makes good, but
// for codes: their multiplier has to.
// Of int8 and fp8, x and inner are what the products take: codes, whole numbers from -127 to 127 or E4M3 values, which
// float16 holds exactly. An input that is scaled before it is rounded comes as a pair of its own, with score 1.
//
// Legend: T tokens, k experts per token, E experts, H hidden, F expert width, N output and K input features of a matrix
// (gate_up: N = 2F, K = H, halves gate | up; down: N = H, K = F), J = K / block.
//
// --- Arrays (dense, row-major, 16-byte aligned) -------------------------------------------------------------------
//   x [T,H], inner [T*k,F], y [T,H]   f16 or bf16, all the same ("the activation type"); of int8 and fp8 f16 only
//   expert_id [T,k]                   i32; an id outside 0 .. E-1 adds nothing, its row of inner is not written
//   score [T,k]                       f32
//   scales                            f32: [E,N] for one scale per output, [E,N,J] for blocks of input features; of exact
//                                     weights any array, such as [1]: it is not read
//   H and F are multiples of 16; blocks are 32, 64 or 128 and divide K; E is at most 512; of int8, K 127^2 < 2^31.
//
// --- Weights: output-major, [E,N,row], a row is one output's K input features --------------------------------------
//   f16, bf16     [E,N,K] of the activation type, plain
//   int8          i32 words [E,N,16*ceil(K/64)], two's complement, -127 to 127
//   fp8           i32 words [E,N,16*ceil(K/64)], OCP E4M3 (no NaN codes)
//   int4          i32 words [E,N,16*ceil(K/128)], offset binary (q + 8)
// A packed row is made of groups of 64 (int8, fp8) or 128 (int4) input features, which take 64 bytes: 16 for each of
// the four lanes that share a row of a tensor-core fragment. Within a group, feature 32b + 8t + i (t lane, b block of
// 32) is value 8b + i of lane t. So every lane reads 16 bytes at once, and a block of 32 features, the smallest that
// has a scale, is two tensor-core steps in 16 bits and one in 8. The 8 values v0 .. v7 of a lane in a block lie in
//   int8, fp8     two words, in bytes, lowest first:    v0 v1 v2 v3 | v4 v5 v6 v7
//   int4          one word, in nibbles, lowest first:   v0 v2 v4 v6 v1 v3 v5 v7, so that masking gives pairs
// Features from K on, in the last group, are stored as zero.
// arriero.graphs.stored.mma_layout packs them.
//
// --- Products, as mma.sync ------------------------------------------------------------------------------------------
//   exact, int4   in the activation type, int4 widened to it as it is read; sums in float32
//   int8          s8 by s8; sums in 32-bit integers, so that nothing is rounded before the scale
//   fp8           E4M3 by E4M3, from sm_89 on; sums move at least every 128 features from the tensor cores, which keep
//                 fewer bits, into float32 registers. Machine code has this product on sm_89, 120 and 121; for sm_90,
//                 100, 103 and 110 ptxas widens both sides to float16: there fp8 saves memory, and no time in products.
//
// --- Kernels -------------------------------------------------------------------------------------------------------
// <op>_<shape>_<activation>_<form>: op gate_up or down; shape decode (few tokens: reads each routed expert's weights
// once per 8 of its tokens, at the rate of memory) or prefill (many: tokens grouped by expert, tiles of 64); form
// exact, int8, fp8 (a scale per output) or int4 (scales per block). Every kernel is right for every T.
// Arguments: the arrays above in that order, int tokens, choices (k), experts, hidden, ffn, block (0 where there are
// none), and the result. launch.py gives threads and grid. No workspace, no atomics on results: the same inputs
// give the same bits. Weights of experts that no token is routed to are not touched.
#pragma once

#include "decode.h"
#include "prefill.h"
