// The vector vocabulary of isa_avx512vnni.h on AVX2, FMA and F16C (x86-64-v3).
#pragma once

#include <immintrin.h>

#include <stdint.h>

namespace ARRIERO_LEVEL {

using Float = __m256;
using Int = __m256i;
struct Weights {
    __m256i value, magnitude;
};
using Bytes = __m256i;
using Quad = __m256i;

constexpr int LANES = 8;
constexpr int REGISTERS = 16;
constexpr int FLOAT_ROWS = 6;
constexpr int FLOAT_VECTORS = 2;
constexpr int INT_ROWS = 4;
constexpr int INT_PANELS = 1;
// Whether tiles of one or two rows, or of short sums, are compiled for blocks of 32 apart, whose loop is unrolled then: a
// twentieth to a seventh quicker from cache. With more rows there are not the registers for it.
constexpr bool UNROLLS_BLOCKS = true;
// Bytes that a stream of codes is asked for ahead of its use: 1,024 to 3,072 are alike, less and more are slower.
template <int>
constexpr int64_t FETCH_AHEAD = 2048;
constexpr int INT8_OFFSET = 0;  // what a dot sees is the stored number and this
constexpr bool DOTS_ARE_UNSIGNED = true;

inline Float load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Float a) { _mm256_storeu_ps(p, a); }
inline Float all(float a) { return _mm256_set1_ps(a); }
inline Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
inline Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
inline Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
inline Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
inline Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Float a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline void store_sums(float* p, Float a, Float b, Float c, Float d) {
    const __m256 all_four = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(all_four), _mm256_extractf128_ps(all_four, 1)));
}
inline Float at_most(Float bound, Float a) { return _mm256_min_ps(bound, a); }
inline Float at_least(Float bound, Float a) { return _mm256_max_ps(bound, a); }
inline float most_of(Float a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline Float nearest_whole(Float a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline Int all_int(int32_t a) { return _mm256_set1_epi32(a); }
inline Int add_int(Int a, Int b) { return _mm256_add_epi32(a, b); }
inline int32_t sum_int(Int a) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
inline Float to_float(Int a) { return _mm256_cvtepi32_ps(a); }
inline Int nearest(Float a) { return _mm256_cvtps_epi32(a); }
inline Float power_of_two(Int a) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(a, _mm256_set1_epi32(127)), 23));
}
inline Int magnitude(Float a) { return _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff)); }
inline Int larger(Int a, Int b) { return _mm256_max_epi32(a, b); }
inline int32_t largest(Int a) {
    const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
inline void store_bytes(int8_t* p, Int a) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

inline Float load_bf16(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Float load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_f16(uint16_t* p, Float a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline Float load_codes(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Float load_e4m3(const uint8_t* p) {
    const __m128i codes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i spread = _mm_srai_epi16(_mm_slli_epi16(codes, 8), 1);
    return _mm256_cvtph_ps(_mm_and_si128(spread, _mm_set1_epi16(static_cast<short>(0xbf80))));
}

inline Quad quad(const int8_t* p) {
    int32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return _mm256_set1_epi32(bits);
}
// vpmaddubsw adds two products in 16 bits, where 255 * 127 * 2 would saturate. |q| * 127 * 2 does not, so the sign goes
// over to the activation.
inline Weights load_int8(const uint8_t* p) {
    const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i value = _mm256_xor_si256(stored, _mm256_set1_epi8(-128));
    return {value, _mm256_abs_epi8(value)};
}
// sums + madd(pairs, 1), in the register of the sums: left alone, GCC regroups the sums of several dots, and there are
// not enough registers for that.
inline Int add_pairs(Int sums, __m256i pairs) {
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    __asm__("vpaddd %1, %0, %0" : "+x"(sums) : "x"(fours));
    return sums;
}
inline Int dot8(Int sums, Weights w, Quad x) {
    return add_pairs(sums, _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.value)));
}
inline Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Bytes load_nibbles(const uint8_t* p, int v) {
    const Bytes bytes = load_bytes(p);
    return v == 0 ? bytes : _mm256_srli_epi16(bytes, 4);
}
inline Bytes mask(Bytes a, int bits) { return _mm256_and_si256(a, _mm256_set1_epi8(static_cast<char>(bits))); }
inline Bytes join(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
inline Bytes low_nibbles(Bytes a) { return mask(a, 15); }
inline Bytes high_nibbles(Bytes a) { return mask(_mm256_srli_epi16(a, 4), 15); }
inline Weights nibble_weights(Bytes nibbles) {
    Weights w;
    w.magnitude = nibbles;
    return w;
}
inline Weights look_up(const int8_t* table, Bytes nibbles) {
    const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return nibble_weights(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), nibbles));
}
// Two products of 0 .. 124 and -127 .. 127 fit 16 bits.
inline Int dot7(Int sums, Weights w, Quad x) { return add_pairs(sums, _mm256_maddubs_epi16(w.magnitude, x)); }
// Of 64 features, half a quad of each, 32 products of -8 .. 7 and -127 .. 127 are 32,512 at most. What is summed is
// products of 0 .. 15, which may wrap in between: begun from the correction, the sum ends in those 16 bits.
constexpr int64_t RUN4 = 64;
inline int32_t correction4(Int values, int32_t offset) {
    const __m256i halves = _mm256_hadd_epi32(values, values);
    const __m128i both = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    const __m128i words = _mm_mullo_epi16(both, _mm_set1_epi16(static_cast<short>(-offset)));
    return _mm_cvtsi128_si32(_mm_shufflelo_epi16(words, 0x08));
}
inline Int dot4(Int sums, Weights w, Quad x) {
    const __m256i pairs = _mm256_maddubs_epi16(w.magnitude, x);
    __asm__("vpaddw %1, %0, %0" : "+x"(sums) : "x"(pairs));  // as in `add_pairs`
    return sums;
}
inline Int end4(Int sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

inline Int load_int(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_words(int16_t* p, Int a) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words);
}
inline void store_int_sums(int32_t* p, Int a, Int b, Int c, Int d) {
    const __m256i all_four = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_add_epi32(_mm256_castsi256_si128(all_four), _mm256_extracti128_si256(all_four, 1)));
}

using Pairs = __m256i;
inline Pairs load_pairs(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Pairs all_pairs(const int16_t* p) {
    int32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return _mm256_set1_epi32(bits);
}
inline Pairs widen_codes(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Int dot_pairs(Int sums, Pairs a, Pairs b) { return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)); }
template <int V>
inline void pair_rows(const int8_t* first, const int8_t* second, Pairs* pairs) {
    if constexpr (V == 2) {
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
        const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second));
        pairs[0] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
        pairs[1] = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
    } else {
        static_assert(V == 1);
        const __m128i a = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(first));
        const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(second));
        pairs[0] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
    }
}
template <int V>
inline void order_columns(Int*) {}

}  // namespace ARRIERO_LEVEL
