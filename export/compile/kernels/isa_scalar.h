// The vector vocabulary of isa_avx512vnni.h in plain C++: what the others are tested against, and what any CPU can run.
#pragma once

#include <stdint.h>

namespace ARRIERO_LEVEL {

constexpr int LANES = 4;
constexpr int REGISTERS = 16;
constexpr int FLOAT_ROWS = 2;
constexpr int FLOAT_VECTORS = 4;
constexpr int INT_ROWS = 1;
constexpr int INT_PANELS = 1;
constexpr int INT8_OFFSET = 0;
constexpr bool DOTS_ARE_UNSIGNED = false;

struct Float {
    float at[LANES];
};
struct Int {
    int32_t at[LANES];
};
struct Weights {
    int8_t at[LANES][4];
};
struct Bytes {
    uint8_t at[4 * LANES];
};
struct Quad {
    int8_t at[4];
};

template <class Out, class Function>
inline Out each(Function function) {
    Out out;
    for (int i = 0; i < LANES; ++i) out.at[i] = function(i);
    return out;
}
inline float from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

inline Float load(const float* p) {
    return each<Float>([&](int i) { return p[i]; });
}
inline void store(float* p, Float a) { __builtin_memcpy(p, a.at, sizeof a.at); }
inline Float all(float a) {
    return each<Float>([&](int) { return a; });
}
inline Float add(Float a, Float b) {
    return each<Float>([&](int i) { return a.at[i] + b.at[i]; });
}
inline Float sub(Float a, Float b) {
    return each<Float>([&](int i) { return a.at[i] - b.at[i]; });
}
inline Float mul(Float a, Float b) {
    return each<Float>([&](int i) { return a.at[i] * b.at[i]; });
}
inline Float div(Float a, Float b) {
    return each<Float>([&](int i) { return a.at[i] / b.at[i]; });
}
inline Float fma(Float a, Float b, Float c) {
    return each<Float>([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
}
inline float sum(Float a) { return (a.at[0] + a.at[1]) + (a.at[2] + a.at[3]); }
inline void store_sums(float* p, Float a, Float b, Float c, Float d) {
    p[0] = sum(a), p[1] = sum(b), p[2] = sum(c), p[3] = sum(d);
}
inline Float at_most(Float bound, Float a) {
    return each<Float>([&](int i) { return a.at[i] > bound.at[i] ? bound.at[i] : a.at[i]; });
}
inline Float at_least(Float bound, Float a) {
    return each<Float>([&](int i) { return a.at[i] < bound.at[i] ? bound.at[i] : a.at[i]; });
}
inline float most_of(Float a) {
    float most = a.at[0];
    for (int i = 1; i < LANES; ++i) most = a.at[i] > most ? a.at[i] : most;
    return most;
}
inline Float nearest_whole(Float a) {
    return each<Float>([&](int i) { return __builtin_rintf(a.at[i]); });
}

inline Int all_int(int32_t a) {
    return each<Int>([&](int) { return a; });
}
inline Int add_int(Int a, Int b) {
    return each<Int>([&](int i) { return a.at[i] + b.at[i]; });
}
inline int32_t sum_int(Int a) { return a.at[0] + a.at[1] + a.at[2] + a.at[3]; }
inline Float to_float(Int a) {
    return each<Float>([&](int i) { return static_cast<float>(a.at[i]); });
}
inline Int nearest(Float a) {
    // beyond int32, and for NaN, C++ leaves the conversion open
    return each<Int>(
        [&](int i) { return a.at[i] > -1e9f && a.at[i] < 1e9f ? static_cast<int32_t>(__builtin_rintf(a.at[i])) : 0; });
}
inline Float power_of_two(Int a) {
    return each<Float>([&](int i) { return from_bits(static_cast<uint32_t>(a.at[i] + 127) << 23); });
}
inline Int magnitude(Float a) {
    Int out;
    __builtin_memcpy(out.at, a.at, sizeof out.at);
    return each<Int>([&](int i) { return out.at[i] & 0x7fffffff; });
}
inline Int larger(Int a, Int b) {
    return each<Int>([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
}
inline int32_t largest(Int a) {
    int32_t most = a.at[0];
    for (int i = 1; i < LANES; ++i) most = a.at[i] > most ? a.at[i] : most;
    return most;
}
inline void store_bytes(int8_t* p, Int a) {
    for (int i = 0; i < LANES; ++i) {
        p[i] = static_cast<int8_t>(a.at[i] > 127 ? 127 : a.at[i] < -128 ? -128 : a.at[i]);
    }
}

inline float widen_f16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31,
                   mantissa = half & 1023;
    if (exponent == 0) {
        const float value = static_cast<float>(mantissa) * 0x1p-24f;
        return sign ? -value : value;
    }
    return from_bits(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13);
}
// To the nearest, halves to even; what is beyond float16 becomes infinite, NaN stays.
inline uint16_t narrow_f16(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    if (size < 0x38800000) {  // below 2^-14 steps are 2^-24, which is float32's step from 0.5 on
        const float shifted = from_bits(size) + 0.5f;
        __builtin_memcpy(&bits, &shifted, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
}
inline void store_f16(uint16_t* p, Float a) {
    for (int i = 0; i < LANES; ++i) p[i] = narrow_f16(a.at[i]);
}
inline Float load_codes(const int8_t* p) {
    return each<Float>([&](int i) { return static_cast<float>(p[i]); });
}
inline Float load_bf16(const uint16_t* p) {
    return each<Float>([&](int i) { return from_bits(static_cast<uint32_t>(p[i]) << 16); });
}
inline Float load_f16(const uint16_t* p) {
    return each<Float>([&](int i) { return widen_f16(p[i]); });
}
inline Float load_e4m3(const uint8_t* p) {
    return each<Float>([&](int i) { return widen_f16(static_cast<uint16_t>((p[i] & 128) << 8 | (p[i] & 127) << 7)); });
}

inline Quad quad(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline Weights load_int8(const uint8_t* p) {
    Weights w;
    for (int i = 0; i < 4 * LANES; ++i) w.at[i / 4][i % 4] = static_cast<int8_t>(p[i] - 128);
    return w;
}
template <class Function>
inline Bytes each_byte(Function function) {
    Bytes out;
    for (int i = 0; i < 4 * LANES; ++i) out.at[i] = static_cast<uint8_t>(function(i));
    return out;
}
inline Bytes load_bytes(const uint8_t* p) {
    return each_byte([&](int i) { return p[i]; });
}
inline Bytes mask(Bytes a, int bits) {
    return each_byte([&](int i) { return a.at[i] & bits; });
}
inline Bytes join(Bytes a, Bytes b) {
    return each_byte([&](int i) { return a.at[i] | b.at[i]; });
}
inline Bytes low_nibbles(Bytes a) { return mask(a, 15); }
inline Bytes high_nibbles(Bytes a) {
    return each_byte([&](int i) { return a.at[i] >> 4; });
}
inline Bytes load_nibbles(const uint8_t* p, int v) {
    const Bytes bytes = load_bytes(p + v % 2 * 16);
    return v < 2 ? bytes : high_nibbles(bytes);
}
inline Weights look_up(const int8_t* table, Bytes nibbles) {
    Weights w;
    for (int i = 0; i < 4 * LANES; ++i) w.at[i / 4][i % 4] = table[nibbles.at[i] & 15];
    return w;
}
inline Weights nibble_weights(Bytes nibbles) {
    Weights w;
    for (int i = 0; i < 4 * LANES; ++i) w.at[i / 4][i % 4] = static_cast<int8_t>(nibbles.at[i]);
    return w;
}
inline Int dot8(Int sums, Weights w, Quad x) {
    return each<Int>([&](int i) {
        int32_t total = sums.at[i];
        for (int k = 0; k < 4; ++k) total += w.at[i][k] * x.at[k];
        return total;
    });
}
inline Int dot7(Int sums, Weights w, Quad x) { return dot8(sums, w, x); }
using Few = Int;
constexpr int64_t FEW_FEATURES = INT64_MAX;
inline Few begin_few(Int sums) { return sums; }
inline Few dot4(Few sums, Weights w, Quad x) { return dot8(sums, w, x); }
inline Int end_few(Int, Few few) { return few; }

inline Int load_int(const int32_t* p) {
    return each<Int>([&](int i) { return p[i]; });
}
inline void store_words(int16_t* p, Int a) {
    for (int i = 0; i < LANES; ++i) {
        p[i] = static_cast<int16_t>(a.at[i] > 32767 ? 32767 : a.at[i] < -32768 ? -32768 : a.at[i]);
    }
}
inline void store_int_sums(int32_t* p, Int a, Int b, Int c, Int d) {
    p[0] = sum_int(a), p[1] = sum_int(b), p[2] = sum_int(c), p[3] = sum_int(d);
}

struct Pairs {
    int16_t at[LANES][2];
};
inline Pairs load_pairs(const int16_t* p) {
    Pairs pairs;
    __builtin_memcpy(pairs.at, p, sizeof pairs.at);
    return pairs;
}
inline Pairs all_pairs(const int16_t* p) {
    Pairs pairs;
    for (int i = 0; i < LANES; ++i) pairs.at[i][0] = p[0], pairs.at[i][1] = p[1];
    return pairs;
}
inline Pairs widen_codes(const int8_t* p) {
    Pairs pairs;
    for (int i = 0; i < 2 * LANES; ++i) pairs.at[i / 2][i % 2] = p[i];
    return pairs;
}
inline Int dot_pairs(Int sums, Pairs a, Pairs b) {
    return each<Int>([&](int i) { return sums.at[i] + a.at[i][0] * b.at[i][0] + a.at[i][1] * b.at[i][1]; });
}
template <int V>
inline void pair_rows(const int8_t* first, const int8_t* second, Pairs* pairs) {
    for (int i = 0; i < V * LANES; ++i) {
        pairs[i / LANES].at[i % LANES][0] = first[i];
        pairs[i / LANES].at[i % LANES][1] = second[i];
    }
}
template <int V>
inline void order_columns(Int*) {}

}  // namespace ARRIERO_LEVEL
