// Rounds activations to int8.
#pragma once

#include "codes.h"
#include "rounded.h"

namespace ARRIERO_LEVEL {

// Rounds features [begin, end) of factor * x (block boundaries) into row `row`, to meet weights of `format`.
inline void round_row(const Rounded& to, int64_t row, const float* x, float factor, int64_t format, int64_t begin,
                      int64_t end) {
    int32_t offset = 0;
    with_codes(format, [&](auto codes) { offset = decltype(codes)::OFFSET; });
    const Float factors = all(factor);
    for (int64_t start = begin; start < end; start += to.block) {
        Int most = all_int(0);
        for (int64_t i = start; i < start + to.block; i += LANES)
            most = larger(most, magnitude(mul(load(x + i), factors)));
        const int32_t bits = largest(most);
        float absmax;
        __builtin_memcpy(&absmax, &bits, 4);
        const bool empty = absmax < 1e-30f;  // false for NaN, which goes on into the scale
        const Float inverse = all(empty ? 0.0f : 127.0f / absmax);
        Int total = all_int(0);
        for (int64_t i = start; i < start + to.block; i += LANES) {
            const Int values = nearest(mul(mul(load(x + i), factors), inverse));
            total = add_int(total, values);
            store_bytes(to.values + row * to.features + i, values);
        }
        const int64_t at = row * to.blocks() + start / to.block;
        to.scales[at] = empty ? 0.0f : absmax / 127.0f;
        to.corrections[at] = -offset * sum_int(total);
    }
}

}  // namespace ARRIERO_LEVEL
