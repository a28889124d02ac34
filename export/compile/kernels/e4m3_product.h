// Products of float32 activations with FP8 E4M3 panels, one scale per output feature.
#pragma once

#include "float_tile.h"

namespace ARRIERO_LEVEL {

constexpr int64_t E4M3_AHEAD = 2048;  // bytes that a stream is asked for ahead of its use; 1,024 to 4,096 are alike

// out[m][16p + n] = product of x[m] with output n of panel p, for M rows and P panels.
template <int M, int P>
TILE void e4m3_tile(const float* const* x, const uint8_t* panel, const float* scale, int64_t features,
                    float out[M][16 * P]) {
    constexpr int V = 16 / LANES, PV = P * V;
    Float sums[M][PV];
    UNROLL for (int m = 0; m < M; ++m) { UNROLL for (int v = 0; v < PV; ++v) sums[m][v] = all(0.0f); }
    for (int64_t k = 0; k < features; ++k) {
        if constexpr (M == 1) {
            UNROLL for (int p = 0; p < P; ++p) fetch(panel + (p * features + k) * 16 + E4M3_AHEAD);
        }
        Float w[PV];
        UNROLL for (int v = 0; v < PV; ++v) w[v] = load_e4m3(panel + v / V * features * 16 + k * 16 + v % V * LANES);
        UNROLL for (int m = 0; m < M; ++m) {
            const Float value = all(x[m][k]);
            UNROLL for (int v = 0; v < PV; ++v) sums[m][v] = fma(value, w[v], sums[m][v]);
        }
    }
    UNROLL for (int v = 0; v < PV; ++v) {
        const Float scales = mul(load(scale + v * LANES), all(256.0f));
        UNROLL for (int m = 0; m < M; ++m) store(out[m] + v * LANES, mul(sums[m][v], scales));
    }
}

// Columns [columns.begin, columns.end) of out = x W^T for `count` rows of x [.., features]. `begin` is a multiple
// of 16.
inline void e4m3_product(Rows<const float> x, int64_t count, const uint8_t* weight, const float* scales,
                         int64_t features, Range columns, Rows<float> out, float* piece) {
    if (count > 4) {
        const auto unpack = [&](float* to, int64_t column, int64_t width, int64_t k, int64_t depth) {
            for (int64_t n = 0; n < TILE_COLUMNS; n += LANES) {
                // the last panel is padded, so only whole panels are missing
                const bool missing = n / 16 * 16 >= width;
                const uint8_t* from = weight + ((column + n) / 16 * features + k) * 16 + n % 16;
                for (int64_t d = 0; d < depth; ++d) {
                    store(to + d * TILE_COLUMNS + n, missing ? all(0.0f) : load_e4m3(from + d * 16));
                }
            }
        };
        unpacked_product(unpack, x, count, features, columns, out, piece);
        // scaled in the end, as the sums of few rows are: a row's bits do not depend on how many there are
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t n = columns.begin; n < columns.end; ++n) out[i][n] *= scales[n] * 256.0f;
        }
        return;
    }
    if (count == 0) return;
    with_rows<4>(count, [&](auto tall) {
        constexpr int M = decltype(tall)::value;
        const float* a[M];
        for (int m = 0; m < M; ++m) a[m] = x[m];
        // several panels at a time: the sums of one would wait for each other
        constexpr int MOST = M == 1 ? 4 : M == 2 ? 2 : 1;
        const int64_t panels = (columns.end - columns.begin + 15) / 16;
        for (int64_t done = 0; done < panels;) {
            done += with_rows<MOST>(panels - done, [&](auto wide) {
                constexpr int P = decltype(wide)::value;
                const int64_t column = columns.begin + done * 16;
                float tile[M][16 * P];
                e4m3_tile<M, P>(a, weight + column * features, scales + column, features, tile);
                const int64_t width = smaller<int64_t>(16 * P, columns.end - column);
                for (int m = 0; m < M; ++m) copy_numbers<16 * P>(out[m] + column, tile[m], width);
            });
        }
    });
}

}  // namespace ARRIERO_LEVEL
