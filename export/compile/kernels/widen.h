// Stored exact weights, and the numbers of a cache, as float32.
#pragma once

#include "common.h"

namespace ARRIERO_LEVEL {

template <int FORMAT>
struct Stored;
template <>
struct Stored<ARRIERO_F32> {
    using Type = float;
    static Float widen(const float* p) { return load(p); }
};
template <>
struct Stored<ARRIERO_BF16> {
    using Type = uint16_t;
    static Float widen(const uint16_t* p) { return load_bf16(p); }
};
template <>
struct Stored<ARRIERO_F16> {
    using Type = uint16_t;
    static Float widen(const uint16_t* p) { return load_f16(p); }
};
template <>
struct Stored<ARRIERO_CODES> {
    using Type = int8_t;
    static Float widen(const int8_t* p) { return load_codes(p); }
};

// The first `count` of LANES stored values, then zeros.
template <int FORMAT>
inline Float widen_some(const typename Stored<FORMAT>::Type* p, int64_t count) {
    typename Stored<FORMAT>::Type padded[LANES] = {};
    __builtin_memcpy(padded, p, count * sizeof *padded);
    return Stored<FORMAT>::widen(padded);
}

// to[0 .. count) = the stored values, widened; to[count .. round_up(count, LANES)) = 0.
template <int FORMAT>
inline void widen_row(const typename Stored<FORMAT>::Type* p, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, Stored<FORMAT>::widen(p + i));
    if (i < count) store(to + i, widen_some<FORMAT>(p + i, count - i));
}

}  // namespace ARRIERO_LEVEL
