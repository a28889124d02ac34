// The vector vocabulary of the kernels on AVX-512 with VNNI. isa_avx2.h, isa_neon.h and isa_scalar.h give the same
// names.
//
// Float, Int: LANES float32 or int32. Weights: 4 stored integers for each of LANES outputs. Quad: 4 activations,
// repeated.
#pragma once

#include <immintrin.h>

namespace ARRIERO_LEVEL {

using Float = __m512;
using Int = __m512i;
using Weights = __m512i;
using Quad = __m512i;

constexpr int LANES = 16;
constexpr int REGISTERS = 32;
constexpr int FLOAT_ROWS = 6;     // tile of the float product, in rows
constexpr int FLOAT_VECTORS = 4;  // and in vectors of columns: its sums and one row of operands fill the registers
constexpr int INT_ROWS = 6;       // rows of the integer product's tile, which is two panels wide
constexpr int INT8_OFFSET = 128;  // what `dot8` sees is q + INT8_OFFSET

inline Float load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
inline Float all(float a) { return _mm512_set1_ps(a); }
inline Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
inline Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
inline Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
inline Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
inline Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Float a) { return _mm512_reduce_add_ps(a); }
// The sums of four vectors.
inline void store_sums(float* p, Float a, Float b, Float c, Float d) {
    const __m512d ab = _mm512_castps_pd(add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    const Float all_four =
        add(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all_four), _mm512_extractf32x8_ps(all_four, 1));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
// The smaller or larger of a bound and a value; a NaN value stays.
inline Float at_most(Float bound, Float a) { return _mm512_min_ps(bound, a); }
inline Float at_least(Float bound, Float a) { return _mm512_max_ps(bound, a); }
inline float most_of(Float a) { return _mm512_reduce_max_ps(a); }
inline Float nearest_whole(Float a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline Int all_int(int32_t a) { return _mm512_set1_epi32(a); }
inline Int add_int(Int a, Int b) { return _mm512_add_epi32(a, b); }
inline int32_t sum_int(Int a) { return _mm512_reduce_add_epi32(a); }
inline Float to_float(Int a) { return _mm512_cvtepi32_ps(a); }
inline Int nearest(Float a) { return _mm512_cvtps_epi32(a); }
inline Float power_of_two(Int a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(a, _mm512_set1_epi32(127)), 23));
}
// Magnitudes are compared as bits, where a NaN is above everything and so is never lost.
inline Int magnitude(Float a) { return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)); }
inline Int larger(Int a, Int b) { return _mm512_max_epi32(a, b); }
inline int32_t largest(Int a) { return _mm512_reduce_max_epi32(a); }
inline void store_bytes(int8_t* p, Int a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a)); }

inline Float load_bf16(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Float load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// The E4M3 value times 2^-8: as float16 bits its exponent is 8 too small.
inline Float load_e4m3(const uint8_t* p) {
    const __m256i codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i spread = _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 1);
    return _mm512_cvtph_ps(_mm256_and_si256(spread, _mm256_set1_epi16(static_cast<short>(0xbf80))));
}

inline Quad quad(const int8_t* p) {
    int32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return _mm512_set1_epi32(bits);
}
inline Weights load_int8(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Int dot8(Int sums, Weights w, Quad x) { return _mm512_dpbusd_epi32(sums, w, x); }
inline void load_int4(const uint8_t* p, Weights& low, Weights& high) {
    const __m512i nibble = _mm512_set1_epi8(15), bytes = _mm512_loadu_si512(p);
    low = _mm512_and_si512(bytes, nibble);
    high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
}
inline Int dot4(Int sums, Weights w, Quad x) { return _mm512_dpbusd_epi32(sums, w, x); }

}  // namespace ARRIERO_LEVEL
