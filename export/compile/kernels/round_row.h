// Rounds activations to int8.
#pragma once

#include "codes.h"

namespace ARRIERO_LEVEL {

template <class CODES>
inline void round_for(const Rounded& to, int64_t row, const float* x, float factor, int64_t begin, int64_t end) {
    const Float factors = all(factor);
    const int64_t first = row * to.blocks() + begin / to.block;
    float* scale = to.scales + first;
    int32_t* correction = to.corrections + first * to.runs(CODES::RUN);
    for (int64_t i = begin; i < end;) {
        const int64_t block_end = i + to.block;
        Int most = all_int(0);
        for (int64_t j = i; j < block_end; j += LANES) most = larger(most, magnitude(mul(load(x + j), factors)));
        const int32_t bits = largest(most);
        float absmax;
        __builtin_memcpy(&absmax, &bits, 4);
        const bool empty = absmax < 1e-30f;  // false for NaN, which goes on into the scale
        const Float inverse = all(empty ? 0.0f : 127.0f / absmax);
        *scale++ = empty ? 0.0f : absmax / 127.0f;
        while (i < block_end) {
            const int64_t run_end = block_end - i > CODES::RUN ? i + CODES::RUN : block_end;
            Int total = all_int(0);
            for (; i < run_end; i += LANES) {
                const Int values = nearest(mul(mul(load(x + i), factors), inverse));
                total = add_int(total, values);
                store_bytes(to.values + row * to.features + i, values);
            }
            *correction++ = CODES::correction(total);
        }
    }
}

// Rounds features [begin, end) of factor * x (block boundaries) into row `row`, to meet weights of `format`.
TILE void round_row(const Rounded& to, int64_t row, const float* x, float factor, int64_t format, int64_t begin,
                    int64_t end) {
    with_codes(format, [&](auto codes) { round_for<decltype(codes)>(to, row, x, factor, begin, end); });
}

}  // namespace ARRIERO_LEVEL
