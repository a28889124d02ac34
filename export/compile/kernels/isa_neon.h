// The vector vocabulary of isa_avx512vnni.h on aarch64: NEON, with the dot product instruction where the level has it.
#pragma once

#include <arm_neon.h>

#include <stdint.h>

namespace ARRIERO_LEVEL {

using Float = float32x4_t;
using Int = int32x4_t;
using Weights = int8x16_t;
using Bytes = uint8x16_t;
using Quad = int8x16_t;

constexpr int LANES = 4;
constexpr int REGISTERS = 32;
constexpr int FLOAT_ROWS = 6;
constexpr int FLOAT_VECTORS = 4;
#ifdef __ARM_FEATURE_MATMUL_INT8
constexpr int INT_ROWS = 4;
#else
constexpr int INT_ROWS = 2;
#endif
constexpr int INT_PANELS = 2;
constexpr bool UNROLLS_BLOCKS = false;
// Bytes that a stream of codes is asked for ahead of its use.
template <int>
constexpr int64_t FETCH_AHEAD = 2048;
constexpr int INT8_OFFSET = 0;
constexpr bool DOTS_ARE_UNSIGNED = false;

inline Float load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Float a) { vst1q_f32(p, a); }
inline Float all(float a) { return vdupq_n_f32(a); }
inline Float add(Float a, Float b) { return vaddq_f32(a, b); }
inline Float sub(Float a, Float b) { return vsubq_f32(a, b); }
inline Float mul(Float a, Float b) { return vmulq_f32(a, b); }
inline Float div(Float a, Float b) { return vdivq_f32(a, b); }
inline Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
inline float sum(Float a) { return vaddvq_f32(a); }
inline void store_sums(float* p, Float a, Float b, Float c, Float d) {
    vst1q_f32(p, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}
inline Float at_most(Float bound, Float a) { return vminq_f32(bound, a); }
inline Float at_least(Float bound, Float a) { return vmaxq_f32(bound, a); }
inline float most_of(Float a) { return vmaxvq_f32(a); }
inline Float nearest_whole(Float a) { return vrndnq_f32(a); }

inline Int all_int(int32_t a) { return vdupq_n_s32(a); }
inline Int add_int(Int a, Int b) { return vaddq_s32(a, b); }
inline int32_t sum_int(Int a) { return vaddvq_s32(a); }
inline Float to_float(Int a) { return vcvtq_f32_s32(a); }
inline Int nearest(Float a) { return vcvtnq_s32_f32(a); }
inline Float power_of_two(Int a) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(a, vdupq_n_s32(127)), 23)); }
inline Int magnitude(Float a) { return vandq_s32(vreinterpretq_s32_f32(a), vdupq_n_s32(0x7fffffff)); }
inline Int larger(Int a, Int b) { return vmaxq_s32(a, b); }
inline int32_t largest(Int a) { return vmaxvq_s32(a); }
inline void store_bytes(int8_t* p, Int a) {
    const int16x4_t words = vqmovn_s32(a);
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
    const int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
    __builtin_memcpy(p, &four, 4);
}

inline Float load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline Float load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline void store_f16(uint16_t* p, Float a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
inline Float load_codes(const int8_t* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
}
inline Float load_e4m3(const uint8_t* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, 4);
    const uint16x4_t high = vget_low_u16(vshll_n_u8(vcreate_u8(four), 8));
    const int16x4_t spread = vshr_n_s16(vreinterpret_s16_u16(high), 1);
    return vcvt_f32_f16(vreinterpret_f16_u16(vand_u16(vreinterpret_u16_s16(spread), vdup_n_u16(0xbf80))));
}

inline Quad quad(const int8_t* p) {
    int32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(bits));
}
inline Weights load_int8(const uint8_t* p) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(128))); }
inline Bytes load_bytes(const uint8_t* p) { return vld1q_u8(p); }
inline Bytes mask(Bytes a, int bits) { return vandq_u8(a, vdupq_n_u8(static_cast<uint8_t>(bits))); }
inline Bytes join(Bytes a, Bytes b) { return vorrq_u8(a, b); }
inline Bytes low_nibbles(Bytes a) { return mask(a, 15); }
inline Bytes high_nibbles(Bytes a) { return vshrq_n_u8(a, 4); }
inline Bytes load_nibbles(const uint8_t* p, int v) {
    const Bytes bytes = load_bytes(p + v % 2 * 16);
    return v < 2 ? bytes : high_nibbles(bytes);
}
inline Weights nibble_weights(Bytes nibbles) { return vreinterpretq_s8_u8(nibbles); }
inline Weights look_up(const int8_t* table, Bytes nibbles) { return vqtbl1q_s8(vld1q_s8(table), nibbles); }
#ifdef __ARM_FEATURE_DOTPROD
inline Int dot8(Int sums, Weights w, Quad x) { return vdotq_s32(sums, w, x); }
#else
inline Int dot8(Int sums, Weights w, Quad x) {
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
    return vaddq_s32(sums, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}
#endif
inline Int dot7(Int sums, Weights w, Quad x) { return dot8(sums, w, x); }
constexpr int64_t RUN4 = INT64_MAX;
inline int32_t correction4(Int values, int32_t offset) { return -offset * sum_int(values); }
inline Int dot4(Int sums, Weights w, Quad x) { return dot8(sums, w, x); }
inline Int end4(Int sums) { return sums; }

inline Int load_int(const int32_t* p) { return vld1q_s32(p); }
inline void store_words(int16_t* p, Int a) { vst1_s16(p, vqmovn_s32(a)); }
inline void store_int_sums(int32_t* p, Int a, Int b, Int c, Int d) {
    vst1q_s32(p, vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)));
}

// Which of the two numbers go together is free where all sums are added up.
struct Pairs {
    int16x4_t first, second;
};
inline Pairs load_pairs(const int16_t* p) { return {vld1_s16(p), vld1_s16(p + 4)}; }
inline Pairs all_pairs(const int16_t* p) { return {vdup_n_s16(p[0]), vdup_n_s16(p[1])}; }
inline Pairs widen_codes(const int8_t* p) {
    const int16x8_t words = vmovl_s8(vld1_s8(p));
    return {vget_low_s16(words), vget_high_s16(words)};
}
inline Int dot_pairs(Int sums, Pairs a, Pairs b) {
    return vmlal_s16(vmlal_s16(sums, a.first, b.first), a.second, b.second);
}
template <int V>
inline void pair_rows(const int8_t* first, const int8_t* second, Pairs* pairs) {
    if constexpr (V == 4) {
        const int8x16_t a = vld1q_s8(first), b = vld1q_s8(second);
        const int16x8_t words[4] = {vmovl_s8(vget_low_s8(a)), vmovl_high_s8(a), vmovl_s8(vget_low_s8(b)),
                                    vmovl_high_s8(b)};
        for (int v = 0; v < 2; ++v) {
            pairs[2 * v] = {vget_low_s16(words[v]), vget_low_s16(words[2 + v])};
            pairs[2 * v + 1] = {vget_high_s16(words[v]), vget_high_s16(words[2 + v])};
        }
    } else {
        static_assert(V == 1);
        uint32_t a, b;
        __builtin_memcpy(&a, first, 4);
        __builtin_memcpy(&b, second, 4);
        pairs[0] = {vget_low_s16(vmovl_s8(vcreate_s8(a))), vget_low_s16(vmovl_s8(vcreate_s8(b)))};
    }
}
template <int V>
inline void order_columns(Int*) {}

}  // namespace ARRIERO_LEVEL
