// exp and SiLU of vectors.
#pragma once

#include "common.h"

namespace ARRIERO_LEVEL {

// e^a for a in [-87, 88], beyond which it is cut; NaN stays. Cody-Waite reduction by ln 2, Taylor to the 7th power on
// [-ln2/2, ln2/2], where the next term is below 6e-9.
inline Float exponential(Float a) {
    a = at_most(all(88.0f), at_least(all(-87.0f), a));
    const Float n = nearest_whole(mul(a, all(1.44269504f)));
    const Float r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), a));
    Float p = all(1.0f / 5040);
    p = fma(p, r, all(1.0f / 720));
    p = fma(p, r, all(1.0f / 120));
    p = fma(p, r, all(1.0f / 24));
    p = fma(p, r, all(1.0f / 6));
    p = fma(p, r, all(0.5f));
    p = fma(p, r, all(1.0f));
    p = fma(p, r, all(1.0f));
    return mul(p, power_of_two(nearest(n)));
}

// out[i] = silu(gate[i]) * up[i]; `out` may be `gate`.
inline void silu_times(const float* gate, const float* up, float* out, int64_t count) {
    const auto step = [](Float g, Float u) { return mul(div(g, add(all(1.0f), exponential(sub(all(0.0f), g)))), u); };
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(out + i, step(load(gate + i), load(up + i)));
    if (i < count) {
        float g[LANES] = {}, u[LANES] = {};
        __builtin_memcpy(g, gate + i, (count - i) * sizeof(float));
        __builtin_memcpy(u, up + i, (count - i) * sizeof(float));
        store(g, step(load(g), load(u)));
        __builtin_memcpy(out + i, g, (count - i) * sizeof(float));
    }
}

}  // namespace ARRIERO_LEVEL
