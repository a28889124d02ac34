// What `decode_attention.h` does with a span whose keys and values are int8 codes: sums are of integers, and exact.
// Queries and weights are rounded to 16 bits, weights relative to the largest of their KEYS keys.
#pragma once

#include "cached.h"
#include "exponential.h"
#include "workspace.h"

namespace ARRIERO_LEVEL {

constexpr float WORD = 32767.0f;

// Rounds a row to 16 bits, zeros up to `padded`; gives its step, NaN where a number is.
inline float round_to_words(const float* x, int64_t count, int64_t padded, int16_t* to) {
    Int most = all_int(0);
    for (int64_t i = 0; i < count; i += LANES) most = larger(most, magnitude(load(x + i)));
    const int32_t bits = largest(most);
    float absmax;
    __builtin_memcpy(&absmax, &bits, 4);
    const bool empty = absmax < 1e-30f;  // false for NaN
    const Float inverse = all(empty ? 0.0f : WORD / absmax);
    for (int64_t i = 0; i < count; i += LANES) store_words(to + i, nearest(mul(load(x + i), inverse)));
    for (int64_t i = count; i < padded; ++i) to[i] = 0;
    return empty ? 0.0f : absmax / WORD;
}

// Dot products of M rows of words, zero from D on, with N rows of codes; out[m][n].
template <int M, int N>
TILE void code_dot_tile(const int16_t* const* words, const int8_t* codes, int64_t D, int32_t out[M][N]) {
    constexpr int WIDE = 2 * LANES;
    Int sums[M][N];
    UNROLL for (int m = 0; m < M; ++m) { UNROLL for (int n = 0; n < N; ++n) sums[m][n] = all_int(0); }
    int64_t d = 0;
    for (; d + WIDE <= D; d += WIDE) {
        Pairs values[M];
        UNROLL for (int m = 0; m < M; ++m) values[m] = load_pairs(words[m] + d);
        UNROLL for (int n = 0; n < N; ++n) {
            const Pairs row = widen_codes(codes + n * D + d);
            UNROLL for (int m = 0; m < M; ++m) sums[m][n] = dot_pairs(sums[m][n], row, values[m]);
        }
    }
    if (d < D) {
        UNROLL for (int n = 0; n < N; ++n) {
            int8_t padded[WIDE] = {};
            __builtin_memcpy(padded, codes + n * D + d, D - d);
            const Pairs row = widen_codes(padded);
            UNROLL for (int m = 0; m < M; ++m) sums[m][n] = dot_pairs(sums[m][n], row, load_pairs(words[m] + d));
        }
    }
    UNROLL for (int m = 0; m < M; ++m) {
        if constexpr (N % 4 == 0) {
            UNROLL for (int n = 0; n < N; n += 4) {
                store_int_sums(out[m] + n, sums[m][n], sums[m][n + 1], sums[m][n + 2], sums[m][n + 3]);
            }
        } else {
            UNROLL for (int n = 0; n < N; ++n) out[m][n] = sum_int(sums[m][n]);
        }
    }
}

// Turns `count` scores into words, weights relative to the largest score of their KEYS keys; factors[k] is what such a
// word of block k is worth beside the largest score of all, which it gives; `total` is the sum of what all are worth.
inline float softmax_codes(const int32_t* scores, float step, int64_t count, float* scaled, int16_t* weights,
                           float* factors, float& total) {
    constexpr int64_t KEYS = AttentionWorkspace::KEYS;
    const int64_t padded = round_up(count, LANES), blocks = (count + KEYS - 1) / KEYS;
    for (int64_t j = 0; j < padded; j += LANES) store(scaled + j, mul(to_float(load_int(scores + j)), all(step)));
    for (int64_t j = count; j < padded; ++j) scaled[j] = -__builtin_inff();  // whose words are zero
    float most = 0.0f;
    for (int64_t k = 0; k < blocks; ++k) {
        const int64_t end = smaller((k + 1) * KEYS, padded);
        Float above = all(-__builtin_inff());
        for (int64_t j = k * KEYS; j < end; j += LANES) above = at_least(above, load(scaled + j));
        factors[k] = most_of(above);
        most = k == 0 || factors[k] > most ? factors[k] : most;
    }
    total = 0.0f;
    for (int64_t k = 0; k < blocks; ++k) {
        const int64_t end = smaller((k + 1) * KEYS, padded);
        const Float highest = all(factors[k]);
        Int added = all_int(0);
        for (int64_t j = k * KEYS; j < end; j += LANES) {
            const Int words = nearest(mul(exponential(sub(load(scaled + j), highest)), all(WORD)));
            store_words(weights + j, words);
            added = add_int(added, words);
        }
        float factor[LANES];
        store(factor, mul(exponential(sub(highest, all(most))), all(1.0f / WORD)));
        factors[k] = factor[0];
        total += static_cast<float>(sum_int(added)) * factors[k];
    }
    return most;
}

// out[m][0 .. V * LANES) += factors[m] times weights[m][0 .. count) codes; codes are [count, D].
template <int M, int V>
TILE void code_value_tile(const int16_t* const* weights, const float* factors, const int8_t* codes, int64_t count,
                          int64_t D, float* const* out) {
    Int sums[M][V];
    UNROLL for (int m = 0; m < M; ++m) { UNROLL for (int v = 0; v < V; ++v) sums[m][v] = all_int(0); }
    for (int64_t j = 0; j < count; j += 2, codes += 2 * D) {
        const int8_t* next = j + 1 < count ? codes + D : codes;  // where there is none its weight is zero
        fetch(codes + AttentionWorkspace::KEYS * D);
        fetch(next + AttentionWorkspace::KEYS * D);
        Pairs rows[V];
        pair_rows<V>(codes, next, rows);
        UNROLL for (int m = 0; m < M; ++m) {
            const Pairs pair = all_pairs(weights[m] + j);
            UNROLL for (int v = 0; v < V; ++v) sums[m][v] = dot_pairs(sums[m][v], rows[v], pair);
        }
    }
    UNROLL for (int m = 0; m < M; ++m) {
        order_columns<V>(sums[m]);
        UNROLL for (int v = 0; v < V; ++v) {
            float* at = out[m] + v * LANES;
            store(at, fma(to_float(sums[m][v]), all(factors[m]), load(at)));
        }
    }
}

}  // namespace ARRIERO_LEVEL
