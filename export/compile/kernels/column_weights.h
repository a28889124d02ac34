// Products with exact weights in the experts' layout, input-major: [K, N].
#pragma once

#include "float_tile.h"
#include "widen.h"

namespace ARRIERO_LEVEL {

// out[m][0 .. width) += x[m][0 .. D) W for M rows and D input features; W [.., stride].
template <int FORMAT, int M, int D>
TILE void add_scaled_rows(const float* const* x, const typename Stored<FORMAT>::Type* weight, int64_t stride,
                          int64_t width, float* const* out) {
    Float values[M][D];
    UNROLL for (int m = 0; m < M; ++m) { UNROLL for (int d = 0; d < D; ++d) values[m][d] = all(x[m][d]); }
    int64_t n = 0;
    for (; n + LANES <= width; n += LANES) {
        Float sums[M];
        UNROLL for (int m = 0; m < M; ++m) sums[m] = load(out[m] + n);
        UNROLL for (int d = 0; d < D; ++d) {
            const Float w = Stored<FORMAT>::widen(weight + d * stride + n);
            UNROLL for (int m = 0; m < M; ++m) sums[m] = fma(values[m][d], w, sums[m]);
        }
        UNROLL for (int m = 0; m < M; ++m) store(out[m] + n, sums[m]);
    }
    if (n < width) {
        UNROLL for (int m = 0; m < M; ++m) {
            Float total = widen_some<ARRIERO_F32>(out[m] + n, width - n);
            UNROLL for (int d = 0; d < D; ++d) {
                total = fma(values[m][d], widen_some<FORMAT>(weight + d * stride + n, width - n), total);
            }
            float edge[LANES];
            store(edge, total);
            __builtin_memcpy(out[m] + n, edge, (width - n) * sizeof(float));
        }
    }
}

// Columns [columns.begin, columns.end) of out = x W for `count` rows of x [.., features]; W [features, stride].
template <int FORMAT>
inline void column_product(Rows<const float> x, int64_t count, const void* weights, int64_t features, int64_t stride,
                           Range columns, Rows<float> out, float* piece) {
    const auto* weight = static_cast<const typename Stored<FORMAT>::Type*>(weights);
    if (count > 4) {
        const auto unpack = [&](float* to, int64_t column, int64_t width, int64_t k, int64_t depth) {
            for (int64_t d = 0; d < depth; ++d) {
                float* row = to + d * TILE_COLUMNS;
                if (width < TILE_COLUMNS) __builtin_memset(row, 0, TILE_COLUMNS * sizeof(float));
                widen_row<FORMAT>(weight + (k + d) * stride + column, width, row);
            }
        };
        unpacked_product(unpack, x, count, features, columns, out, piece);
        return;
    }
    if (count == 0) return;
    with_rows<4>(count, [&](auto tall) {
        constexpr int M = decltype(tall)::value;
        constexpr int D = M == 1 ? 8 : 4;
        const int64_t width = columns.end - columns.begin;
        float* to[M];
        for (int m = 0; m < M; ++m) {
            to[m] = out[m] + columns.begin;
            __builtin_memset(to[m], 0, width * sizeof(float));
        }
        for (int64_t k = 0; k < features;) {
            k += with_rows_or_one<D>(features - k, [&](auto deep) {
                const float* a[M];
                for (int m = 0; m < M; ++m) a[m] = x[m] + k;
                add_scaled_rows<FORMAT, M, decltype(deep)::value>(a, weight + k * stride + columns.begin, stride, width,
                                                                  to);
            });
        }
    });
}

}  // namespace ARRIERO_LEVEL
