// The product of some rows with some columns of a weight matrix, whatever the format.
#pragma once

#include "column_weights.h"
#include "e4m3_product.h"
#include "int_product.h"
#include "row_weights.h"

namespace ARRIERO_LEVEL {

enum class Layout { rows, columns };  // of exact weights: [N, K] or [K, N]

struct Matrix {
    int64_t format;
    Layout layout;
    const void* weight;
    const void* scales;
    int64_t features;  // K
    int64_t outputs;   // N
};

// Activations: float32, or rounded for integer formats.
struct Input {
    Rows<const float> exact;
    Rounded rounded;
};

template <int FORMAT>
inline void exact_product(const Matrix& w, Rows<const float> x, int64_t count, Range columns, Rows<float> out,
                          float* piece) {
    if (w.layout == Layout::rows) {
        row_product<FORMAT>(x, count, w.weight, w.features, w.outputs, columns, out, piece);
    } else {
        column_product<FORMAT>(x, count, w.weight, w.features, w.outputs, columns, out, piece);
    }
}

// Columns [columns.begin, columns.end) of out = x W^T for `count` rows, picked from both by `order`; `piece` is
// PIECE_BYTES of scratch. columns.begin is a multiple of 16 where W is in panels.
inline void product(const Matrix& w, const Input& x, const int64_t* order, int64_t count, Range columns,
                    Rows<float> out, float* piece) {
    const auto* panels = static_cast<const uint8_t*>(w.weight);
    Rows<const float> exact = x.exact;
    exact.order = out.order = order;
    const BlockScales scales{w.scales, has_halves(w.format)};
    switch (w.format) {
        case ARRIERO_F32:
            return exact_product<ARRIERO_F32>(w, exact, count, columns, out, piece);
        case ARRIERO_BF16:
            return exact_product<ARRIERO_BF16>(w, exact, count, columns, out, piece);
        case ARRIERO_F16:
            return exact_product<ARRIERO_F16>(w, exact, count, columns, out, piece);
        case ARRIERO_E4M3:
            return e4m3_product(exact, count, panels, static_cast<const float*>(w.scales), w.features, columns, out,
                                piece);
        default:
            return with_codes(w.format, [&](auto codes) {
                int_product<decltype(codes)>(x.rounded, order, count, panels, scales, columns, out);
            });
    }
}

// Columns are shared out in multiples of this: whole panels and, for many rows, whole tiles.
inline int64_t column_unit(int64_t format, int64_t count) { return is_integer(format) || count <= FEW_ROWS ? 32 : 64; }

}  // namespace ARRIERO_LEVEL
