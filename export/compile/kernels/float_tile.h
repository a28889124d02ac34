// The float32 matrix product's inner tile, and the product of many rows with weights unpacked piece by piece.
#pragma once

#include "workspace.h"

namespace ARRIERO_LEVEL {

constexpr int TILE_COLUMNS = FLOAT_VECTORS * LANES;
constexpr int64_t PIECE_DEPTH = 256;  // input features unpacked at a time
static_assert(PIECE_DEPTH * TILE_COLUMNS * 4 <= PIECE_BYTES);

// out[m][0 .. V * LANES) = a[m][0 .. depth) b, or adds it; b is [depth, b_stride].
template <int M, int V = FLOAT_VECTORS>
TILE void float_tile(const float* const* a, const float* b, int64_t b_stride, int64_t depth, float* const* out,
                     bool adds) {
    Float sums[M][V];
    UNROLL for (int m = 0; m < M; ++m) {
        UNROLL for (int v = 0; v < V; ++v) sums[m][v] = adds ? load(out[m] + v * LANES) : all(0.0f);
    }
    for (int64_t k = 0; k < depth; ++k, b += b_stride) {
        Float w[V];
        UNROLL for (int v = 0; v < V; ++v) w[v] = load(b + v * LANES);
        UNROLL for (int m = 0; m < M; ++m) {
            const Float value = all(a[m][k]);
            UNROLL for (int v = 0; v < V; ++v) sums[m][v] = fma(value, w[v], sums[m][v]);
        }
    }
    UNROLL for (int m = 0; m < M; ++m) { UNROLL for (int v = 0; v < V; ++v) store(out[m] + v * LANES, sums[m][v]); }
}

// `float_tile` of which only the first `width` columns are wanted.
template <int M>
inline void float_edge_tile(const float* const* a, const float* b, int64_t b_stride, int64_t depth, float* const* out,
                            bool adds, int64_t width) {
    float edge[M][TILE_COLUMNS] = {};
    float* rows[M];
    for (int m = 0; m < M; ++m) {
        rows[m] = edge[m];
        if (adds) __builtin_memcpy(edge[m], out[m], width * sizeof(float));
    }
    float_tile<M>(a, b, b_stride, depth, rows, adds);
    for (int m = 0; m < M; ++m) __builtin_memcpy(out[m], edge[m], width * sizeof(float));
}

// `width` columns from `column` on of out, which is `piece` times the features from `k` on of `count` rows of x, added
// to what is there but for k = 0.
TILE void piece_product(const float* piece, Rows<const float> x, int64_t count, int64_t k, int64_t depth,
                        int64_t column, int64_t width, Rows<float> out) {
    for (int64_t i = 0; i < count;) {
        i += with_rows<FLOAT_ROWS>(count - i, [&](auto tall) {
            constexpr int M = decltype(tall)::value;
            const float* a[M];
            float* to[M];
            for (int m = 0; m < M; ++m) a[m] = x[i + m] + k, to[m] = out[i + m] + column;
            if (width == TILE_COLUMNS) {
                float_tile<M>(a, piece, TILE_COLUMNS, depth, to, k > 0);
            } else {
                float_edge_tile<M>(a, piece, TILE_COLUMNS, depth, to, k > 0, width);
            }
        });
    }
}

// Columns [columns.begin, columns.end) of out = x W^T for `count` rows of x [.., K]. unpack(piece, column, width, k,
// depth) writes W's columns from `column` and features from `k` as float32 [depth, TILE_COLUMNS], zero from `width` on.
template <class Unpack>
inline void unpacked_product(Unpack unpack, Rows<const float> x, int64_t count, int64_t features, Range columns,
                             Rows<float> out, float* piece) {
    for (int64_t column = columns.begin; column < columns.end; column += TILE_COLUMNS) {
        const int64_t width = smaller<int64_t>(TILE_COLUMNS, columns.end - column);
        for (int64_t k = 0; k < features; k += PIECE_DEPTH) {
            const int64_t depth = smaller(PIECE_DEPTH, features - k);
            unpack(piece, column, width, k, depth);
            piece_product(piece, x, count, k, depth, column, width, out);
        }
    }
}

}  // namespace ARRIERO_LEVEL
