// The vector vocabulary of isa_avx512vnni.h in portable C++: what the others are tested against, and what any CPU can
// run. The compiler's own vectors become instructions at once; arrays of the same length took it twice as long.
#pragma once

#include <stdint.h>

namespace ARRIERO_LEVEL {

constexpr int LANES = 4;
constexpr int REGISTERS = 16;
constexpr int FLOAT_ROWS = 2;
constexpr int FLOAT_VECTORS = 4;
constexpr int INT_ROWS = 1;
constexpr int INT_PANELS = 1;
constexpr bool UNROLLS_BLOCKS = false;
// Bytes that a stream of codes is asked for ahead of its use.
template <int>
constexpr int64_t FETCH_AHEAD = 2048;
constexpr int INT8_OFFSET = 0;
constexpr bool DOTS_ARE_UNSIGNED = false;

typedef float Float __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
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
    for (int i = 0; i < LANES; ++i) out[i] = function(i);
    return out;
}
inline float from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

inline Float load(const float* p) {
    Float a;
    __builtin_memcpy(&a, p, sizeof a);
    return a;
}
inline void store(float* p, Float a) { __builtin_memcpy(p, &a, sizeof a); }
inline Float all(float a) { return Float{a, a, a, a}; }
inline Float add(Float a, Float b) { return a + b; }
inline Float sub(Float a, Float b) { return a - b; }
inline Float mul(Float a, Float b) { return a * b; }
inline Float div(Float a, Float b) { return a / b; }
inline Float fma(Float a, Float b, Float c) { return a * b + c; }
inline float sum(Float a) { return (a[0] + a[1]) + (a[2] + a[3]); }
inline void store_sums(float* p, Float a, Float b, Float c, Float d) {
    p[0] = sum(a), p[1] = sum(b), p[2] = sum(c), p[3] = sum(d);
}
inline Float at_most(Float bound, Float a) { return a > bound ? bound : a; }
inline Float at_least(Float bound, Float a) { return a < bound ? bound : a; }
inline float most_of(Float a) {
    float most = a[0];
    for (int i = 1; i < LANES; ++i) most = a[i] > most ? a[i] : most;
    return most;
}
inline Float nearest_whole(Float a) {
    return each<Float>([&](int i) { return __builtin_rintf(a[i]); });
}

inline Int all_int(int32_t a) { return Int{a, a, a, a}; }
inline Int add_int(Int a, Int b) { return a + b; }
inline int32_t sum_int(Int a) { return a[0] + a[1] + a[2] + a[3]; }
inline Float to_float(Int a) { return __builtin_convertvector(a, Float); }
inline Int nearest(Float a) {
    // beyond int32, and for NaN, C++ leaves the conversion open
    return each<Int>(
        [&](int i) { return a[i] > -1e9f && a[i] < 1e9f ? static_cast<int32_t>(__builtin_rintf(a[i])) : 0; });
}
inline Float power_of_two(Int a) { return (Float)((a + 127) << 23); }
inline Int magnitude(Float a) { return (Int)a & 0x7fffffff; }
inline Int larger(Int a, Int b) { return a > b ? a : b; }
inline int32_t largest(Int a) {
    int32_t most = a[0];
    for (int i = 1; i < LANES; ++i) most = a[i] > most ? a[i] : most;
    return most;
}
inline void store_bytes(int8_t* p, Int a) {
    for (int i = 0; i < LANES; ++i) p[i] = static_cast<int8_t>(a[i] > 127 ? 127 : a[i] < -128 ? -128 : a[i]);
}

inline Float widen_f16(Halves halves) {
    const Int bits = __builtin_convertvector(halves, Int);
    // as if the exponent's bias were float32's; numbers below float16's normal ones come right too
    const Int size = (Int)((Float)((bits & 0x7fff) << 13) * 0x1p112f);
    return (Float)(size | (size >= 0x47800000 ? all_int(0x7f800000) : all_int(0)) | (bits & 0x8000) << 16);
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
    for (int i = 0; i < LANES; ++i) p[i] = narrow_f16(a[i]);
}
inline Halves load_halves(const uint16_t* p) {
    Halves halves;
    __builtin_memcpy(&halves, p, sizeof halves);
    return halves;
}
inline Float load_codes(const int8_t* p) { return Float{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
inline Float load_bf16(const uint16_t* p) { return (Float)(__builtin_convertvector(load_halves(p), Int) << 16); }
inline Float load_f16(const uint16_t* p) { return widen_f16(load_halves(p)); }
inline Float load_e4m3(const uint8_t* p) {
    const Halves bytes = {p[0], p[1], p[2], p[3]};
    return widen_f16((bytes & 128) << 8 | (bytes & 127) << 7);
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
        int32_t total = sums[i];
        for (int k = 0; k < 4; ++k) total += w.at[i][k] * x.at[k];
        return total;
    });
}
inline Int dot7(Int sums, Weights w, Quad x) { return dot8(sums, w, x); }
constexpr int64_t RUN4 = INT64_MAX;
inline int32_t correction4(Int values, int32_t offset) { return -offset * sum_int(values); }
inline Int dot4(Int sums, Weights w, Quad x) { return dot8(sums, w, x); }
inline Int end4(Int sums) { return sums; }

inline Int load_int(const int32_t* p) {
    return each<Int>([&](int i) { return p[i]; });
}
inline void store_words(int16_t* p, Int a) {
    for (int i = 0; i < LANES; ++i) {
        p[i] = static_cast<int16_t>(a[i] > 32767 ? 32767 : a[i] < -32768 ? -32768 : a[i]);
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
    return each<Int>([&](int i) { return sums[i] + a.at[i][0] * b.at[i][0] + a.at[i][1] * b.at[i][1]; });
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
