// Products with exact weights in a linear layer's layout, [N, K].
#pragma once

#include "float_tile.h"
#include "widen.h"

namespace ARRIERO_LEVEL {

// Dot products of M rows of x with N rows of weights; out[m][n].
template <int FORMAT, int M, int N>
TILE void dot_tile(const float* const* x, const typename Stored<FORMAT>::Type* weight, int64_t features,
                   float out[M][N]) {
    Float sums[M][N];
    UNROLL for (int m = 0; m < M; ++m) { UNROLL for (int n = 0; n < N; ++n) sums[m][n] = all(0.0f); }
    int64_t k = 0;
    for (; k + LANES <= features; k += LANES) {
        Float values[M];
        UNROLL for (int m = 0; m < M; ++m) values[m] = load(x[m] + k);
        UNROLL for (int n = 0; n < N; ++n) {
            if constexpr (M == 1 && N > 1) fetch(weight + (N + n) * features + k);  // of the next N rows
            const Float w = Stored<FORMAT>::widen(weight + n * features + k);
            UNROLL for (int m = 0; m < M; ++m) sums[m][n] = fma(values[m], w, sums[m][n]);
        }
    }
    if (k < features) {
        UNROLL for (int m = 0; m < M; ++m) {
            const Float value = widen_some<ARRIERO_F32>(x[m] + k, features - k);
            UNROLL for (int n = 0; n < N; ++n) {
                sums[m][n] = fma(value, widen_some<FORMAT>(weight + n * features + k, features - k), sums[m][n]);
            }
        }
    }
    UNROLL for (int m = 0; m < M; ++m) {
        if constexpr (N % 4 == 0) {
            UNROLL for (int n = 0; n < N; n += 4) {
                store_sums(out[m] + n, sums[m][n], sums[m][n + 1], sums[m][n + 2], sums[m][n + 3]);
            }
        } else {
            UNROLL for (int n = 0; n < N; ++n) out[m][n] = sum(sums[m][n]);
        }
    }
}

// Turns float32 rows [16][64] into columns: piece[k * TILE_COLUMNS + n] for k < 64, n < 16.
TILE void transpose_rows(const float rows[16][64], float* piece) {
    typedef float Four __attribute__((vector_size(16)));
    for (int n = 0; n < 16; n += 4) {
        for (int k = 0; k < 64; k += 4) {
            Four r[4];
            for (int i = 0; i < 4; ++i) __builtin_memcpy(&r[i], &rows[n + i][k], 16);
            const Four a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5),
                       b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
            const Four c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7),
                       d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
            const Four columns[4] = {
                __builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
                __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
            for (int i = 0; i < 4; ++i) __builtin_memcpy(piece + (k + i) * TILE_COLUMNS + n, &columns[i], 16);
        }
    }
}

// Unpacks `width` rows of weight [.., stride] (from features `k`, `depth` of them) for `unpacked_product`.
template <int FORMAT>
TILE void unpack_rows(const typename Stored<FORMAT>::Type* weight, int64_t stride, int64_t width, int64_t depth,
                      float* piece) {
    float rows[16][64] = {};
    for (int64_t k = 0; k < depth; k += 64) {
        const int64_t count = smaller<int64_t>(64, depth - k);
        for (int64_t n = 0; n < TILE_COLUMNS; n += 16) {
            for (int64_t i = 0; i < 16; ++i) {
                if (n + i < width) {
                    widen_row<FORMAT>(weight + (n + i) * stride + k, count, rows[i]);
                } else {
                    __builtin_memset(rows[i], 0, sizeof rows[i]);
                }
            }
            transpose_rows(rows, piece + k * TILE_COLUMNS + n);
        }
    }
}

constexpr int64_t FEW_ROWS = 8;        // decode's, whose products are dots whatever the matrix
constexpr int64_t FEW_OUTPUTS = 256;   // a router's, whose products are dots however many the rows

// Columns [columns.begin, columns.end) of out = x W^T for `count` rows of x [.., features]; W [outputs, features].
template <int FORMAT>
inline void row_product(Rows<const float> x, int64_t count, const void* weights, int64_t features, int64_t outputs,
                        Range columns, Rows<float> out, float* piece) {
    const auto* weight = static_cast<const typename Stored<FORMAT>::Type*>(weights);
    if (count > FEW_ROWS && outputs > FEW_OUTPUTS) {
        const auto unpack = [&](float* to, int64_t column, int64_t width, int64_t k, int64_t depth) {
            unpack_rows<FORMAT>(weight + column * features + k, features, width, depth, to);
        };
        unpacked_product(unpack, x, count, features, columns, out, piece);
        return;
    }
    if (count == 0) return;
    for (int64_t column = columns.begin; column < columns.end;) {
        const int64_t left = columns.end - column;
        const auto multiply = [&](auto most, auto wide) {
            constexpr int N = decltype(wide)::value;
            for (int64_t i = 0; i < count;) {
                i += with_rows<decltype(most)::value>(count - i, [&](auto tall) {
                    constexpr int M = decltype(tall)::value;
                    const float* a[M];
                    float tile[M][N];
                    for (int m = 0; m < M; ++m) a[m] = x[i + m];
                    dot_tile<FORMAT, M, N>(a, weight + column * features, features, tile);
                    for (int m = 0; m < M; ++m) __builtin_memcpy(out[i + m] + column, tile[m], sizeof tile[m]);
                });
            }
        };
        // four columns are summed in one order and one in another, so which are one does not depend on the rows
        if (count == 1 && left >= 8) {
            multiply(Constant<1>{}, Constant<8>{});
            column += 8;
        } else {
            column += with_rows_or_one<4>(left, [&](auto wide) { multiply(Constant<4>{}, wide); });
        }
    }
}

}  // namespace ARRIERO_LEVEL
