// The vector vocabulary of the kernels on AVX-512 with VNNI. isa_avx2.h, isa_neon.h and isa_scalar.h give the same
// names.
//
// Float, Int: LANES float32 or int32. Weights: 4 stored integers for each of LANES outputs. Quad: 4 activations,
// repeated.
#pragma once

#include <immintrin.h>

#include <stdint.h>

namespace ARRIERO_LEVEL {

using Float = __m512;
using Int = __m512i;
using Weights = __m512i;
using Bytes = __m512i;
using Quad = __m512i;

constexpr int LANES = 16;
constexpr int REGISTERS = 32;
constexpr int FLOAT_ROWS = 6;     // tile of the float product, in rows
constexpr int FLOAT_VECTORS = 4;  // and in vectors of columns: its sums and one row of operands fill the registers
constexpr int INT_ROWS = 6;       // tile of the integer product, in rows
constexpr int INT_PANELS = 2;     // and in panels of 16 outputs
constexpr bool UNROLLS_BLOCKS = false;
// Bytes that a stream of codes is asked for ahead of its use. Of few bits 2,048 is slower and 8,192 no faster; of eight,
// on Zen 4, whatever is asked for is slower than what the processor fetches by itself.
template <int BITS>
constexpr int64_t FETCH_AHEAD = BITS == 8 ? 0 : 4096;
constexpr int INT8_OFFSET = 128;  // what a dot sees is the stored number and this
constexpr bool DOTS_ARE_UNSIGNED = true;

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
inline void store_f16(uint16_t* p, Float a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline Float load_codes(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
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
// In the register of the sums: left alone, GCC copies them between dots, and there are not enough registers for that.
inline Int dot8(Int sums, Weights w, Quad x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(w), "v"(x));
    return sums;
}
// 4 * LANES bytes. Of the nibbles of 32 bytes, low ones first, the v-th 4 * LANES in the low halves of bytes; what the
// high halves hold is open.
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes load_nibbles(const uint8_t* p, int) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1);
}
inline Bytes mask(Bytes a, int bits) { return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(bits))); }
inline Bytes join(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
inline Bytes low_nibbles(Bytes a) { return mask(a, 15); }
inline Bytes high_nibbles(Bytes a) { return mask(_mm512_srli_epi16(a, 4), 15); }
inline Weights nibble_weights(Bytes nibbles) { return nibbles; }
// The levels of a table of 16 that nibbles number, as `dot7` reads them.
inline Weights look_up(const int8_t* table, Bytes nibbles) {
    const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(levels), nibbles);
}
inline Int dot7(Int sums, Weights w, Quad x) { return dot8(sums, w, x); }
// Sums of dots of 4-bit weights, of RUN4 features at most: begun from a correction, which takes `offset` off weights
// (`values` are the activations, LANES at a time added up), and ended.
constexpr int64_t RUN4 = INT64_MAX;
inline int32_t correction4(Int values, int32_t offset) { return -offset * sum_int(values); }
inline Int dot4(Int sums, Weights w, Quad x) { return dot8(sums, w, x); }
inline Int end4(Int sums) { return sums; }

inline Int load_int(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store_words(int16_t* p, Int a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(a));
}
inline void store_int_sums(int32_t* p, Int a, Int b, Int c, Int d) {
    const Int ab = add_int(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const Int cd = add_int(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const Int all_four = add_int(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all_four), _mm512_extracti64x4_epi64(all_four, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}

// Pairs: two 16-bit integers for each of LANES sums. Codes are int8.
using Pairs = __m512i;
inline Pairs load_pairs(const int16_t* p) { return _mm512_loadu_si512(p); }
inline Pairs all_pairs(const int16_t* p) {
    int32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return _mm512_set1_epi32(bits);
}
inline Pairs widen_codes(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Int dot_pairs(Int sums, Pairs a, Pairs b) { return _mm512_dpwssd_epi32(sums, a, b); }
// The codes of V * LANES columns in two rows, paired by column; their sums are in the order that `order_columns` ends.
template <int V>
inline void pair_rows(const int8_t* first, const int8_t* second, Pairs* pairs) {
    if constexpr (V == 4) {
        const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
        const __m512i low = _mm512_unpacklo_epi8(a, b), high = _mm512_unpackhi_epi8(a, b);
        pairs[0] = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(low));
        pairs[1] = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(high));
        pairs[2] = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(low, 1));
        pairs[3] = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(high, 1));
    } else {
        static_assert(V == 1);
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
        const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second));
        pairs[0] = _mm512_cvtepi8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b)));
    }
}
template <int V>
inline void order_columns(Int* sums) {
    for (int v = 0; v + 1 < V; v += 2) {  // low and high halves of 128 bits are apart
        const Int low = sums[v], high = sums[v + 1];
        sums[v] = _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
        sums[v + 1] = _mm512_inserti64x4(high, _mm512_extracti64x4_epi64(low, 1), 0);
    }
}

}  // namespace ARRIERO_LEVEL
