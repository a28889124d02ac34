// The same names as export/compile/cuda/ptx.h, on a CPU: fragments by the layouts that the PTX manual documents.
#pragma once

#include "emulator.h"

#include <cmath>

namespace arriero {

using u16 = unsigned short;
using u32 = unsigned int;

struct alignas(16) Quad {
    u32 word[4];
};

#define ARRIERO_DEVICE inline
#define ARRIERO_SHARED(Type, name) Type& name = emulator::shared<Type>()

inline int load_int(const int* pointer) {
    emulator::check(pointer, 4, false);
    return *pointer;
}
inline float load_float(const float* pointer) {
    emulator::check(pointer, 4, false);
    return *pointer;
}
inline Quad load_quad(const void* pointer) {
    emulator::check(pointer, 16, false);
    return *static_cast<const Quad*>(pointer);
}
inline void store_half(u16* pointer, u16 bits) { emulator::store(pointer, bits); }

inline void copy_weights(Quad* to, const void* from, bool valid) { emulator::copy(to, from, 16, valid); }
inline void copy_tokens(Quad* to, const void* from, bool valid) { emulator::copy(to, from, 16, valid); }
inline void copy_scale(float* to, const float* from, bool valid) { emulator::copy(to, from, 4, valid); }
inline void commit_copies() { emulator::commit(); }
template <int pending>
inline void wait_copies() {
    emulator::wait(pending);
}

inline void block_barrier() { emulator::block_barrier(); }
inline bool block_any(bool value) { return emulator::block_any(value); }

inline void meet(emulator::Operands*) {}
inline void warp_barrier() { emulator::warp_together(meet, {}); }

inline void vote(emulator::Operands* lanes) {
    u32 mask = 0;
    for (int i = 0; i < 32; ++i) mask |= lanes[i].word[0] << i;
    for (int i = 0; i < 32; ++i) lanes[i].word[0] = mask;
}
inline u32 warp_ballot(bool value) { return emulator::warp_together(vote, {nullptr, {value}, {}}).word[0]; }

inline void shuffle(emulator::Operands* lanes) {  // word[1] is the lane to read
    u32 values[32];
    for (int i = 0; i < 32; ++i) values[i] = lanes[i].word[0];
    for (int i = 0; i < 32; ++i) lanes[i].word[0] = values[lanes[i].word[1]];
}
inline int warp_from(int value, int lane) {
    const emulator::Operands mine{nullptr, {static_cast<u32>(value), static_cast<u32>(lane)}, {}};
    return static_cast<int>(emulator::warp_together(shuffle, mine).word[0]);
}
inline int warp_shift_up(int value, int by) {
    const int lane = threadIdx.x % 32;
    return warp_from(value, lane < by ? lane : lane - by);
}

inline void count_shared(int* counter) { ++*counter; }
inline int count_bits(u32 bits) { return __builtin_popcount(bits); }
inline int lowest_bit(u32 bits) { return __builtin_ctz(bits); }

inline u32 and_or(u32 x, u32 mask, u32 bits) { return (x & mask) | bits; }
inline u32 choose_bytes(u32 a, u32 b, u32 selector) {
    const unsigned long long bytes = a | static_cast<unsigned long long>(b) << 32;
    u32 chosen = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 which = selector >> 4 * i & 7;
        chosen |= static_cast<u32>(bytes >> 8 * which & 255) << 8 * i;
    }
    return chosen;
}

inline float exponential2(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }

// sum[16xK] += a[16xK] b[Kx8] of values that lie `PER_WORD` in a word, K = 8 PER_WORD. Lane 4g + t holds, of a the rows g
// and g + 8, of b the column g, in each the words t and 4 + t of the row or column; of sum the rows g and g + 8 in the
// columns 2t, 2t + 1.
template <class Type>
void multiply_fragments(emulator::Operands* lanes) {
    constexpr int PER_WORD = Type::PER_WORD, K = 8 * PER_WORD, BITS = 32 / PER_WORD;
    typename Type::Sum a[16][K], b[K][8];
    const auto value = [](u32 word, int j) { return Type::value(word >> BITS * j & ((1u << BITS) - 1)); };
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const u32* word = lanes[lane].word;
        for (int j = 0; j < PER_WORD; ++j) {
            for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][(t + 4 * (i / 2)) * PER_WORD + j] = value(word[i], j);
            for (int i = 0; i < 2; ++i) b[(t + 4 * i) * PER_WORD + j][g] = value(word[4 + i], j);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        typename Type::Sum sums[4];
        memcpy(sums, lanes[lane].sum, sizeof sums);
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            typename Type::Sum sum = 0;
            for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
            sums[i] += sum;
        }
        memcpy(lanes[lane].sum, sums, sizeof sums);
    }
}

// What all types of operands have in common: their sums' type, and how many values a word holds.
template <class Type, class SumOf, int COUNT>
struct Operand {
    using Sum = SumOf;
    static constexpr int PER_WORD = COUNT;
    static void multiply_tile(Sum (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
        emulator::Operands mine{nullptr, {a0, a1, a2, a3, b0, b1}, {}};
        memcpy(mine.sum, sum, sizeof sum);
        memcpy(sum, emulator::warp_together(multiply_fragments<Type>, mine).sum, sizeof sum);
    }
};

template <class Act>
inline u32 multiply_add_of(u32 a, u32 b, u32 c) {
    u32 d = 0;
    for (int i = 0; i < 32; i += 16) {
        const double x = Act::value(static_cast<u16>(a >> i)), y = Act::value(static_cast<u16>(b >> i));
        const double exact = x * y + static_cast<double>(Act::value(static_cast<u16>(c >> i)));
        d |= static_cast<u32>(Act::round(static_cast<float>(exact))) << i;
    }
    return d;
}

struct Half : Operand<Half, float, 2> {
    static float value(u16 bits) {
        _Float16 x;
        memcpy(&x, &bits, 2);
        return static_cast<float>(x);
    }
    static u16 round(float x) {
        emulator::machine.rounded = x;
        const auto narrow = static_cast<_Float16>(x);
        u16 bits;
        memcpy(&bits, &narrow, 2);
        return bits;
    }
    static u32 multiply_add(u32 a, u32 b, u32 c) { return multiply_add_of<Half>(a, b, c); }
};

struct Bfloat : Operand<Bfloat, float, 2> {
    static float value(u16 bits) {
        const u32 wide = static_cast<u32>(bits) << 16;
        float x;
        memcpy(&x, &wide, 4);
        return x;
    }
    static u16 round(float x) {
        emulator::machine.rounded = x;
        u32 bits;
        memcpy(&bits, &x, 4);
        if (std::isnan(x)) return 0x7fc0;
        return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    static u32 multiply_add(u32 a, u32 b, u32 c) { return multiply_add_of<Bfloat>(a, b, c); }
};

struct Int8Product : Operand<Int8Product, int, 4> {
    static int value(u32 bits) { return static_cast<signed char>(bits); }
};

struct E4m3Product : Operand<E4m3Product, float, 4> {
    static float value(u32 bits) {
        const int exponent = bits >> 3 & 15, fraction = bits & 7;
        if (exponent == 15 && fraction == 7) return NAN;
        const float magnitude = exponent ? std::ldexp(8.0f + fraction, exponent - 10) : std::ldexp(1.0f * fraction, -9);
        return bits & 0x80 ? -magnitude : magnitude;
    }
    // the nearest, of two the one with an even fraction; what is beyond 448 becomes 448
    static u32 nearest(float x) {
        if (std::isnan(x)) return 0x7f;
        const float magnitude = std::fmin(std::fabs(x), 448.0f);
        const int exponent = magnitude < 0x1p-6f ? -6 : std::ilogb(magnitude);
        const u32 eighths = static_cast<u32>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));  // 16 is the next 8
        return (std::signbit(x) ? 0x80 : 0) | ((exponent + 6) * 8 + eighths);
    }
    static u32 narrow(u32 first, u32 second) {
        u32 bytes = 0;
        for (int i = 0; i < 4; ++i) {
            const u32 word = i < 2 ? first : second;
            bytes |= nearest(Half::value(static_cast<u16>(word >> 16 * (i % 2)))) << 8 * i;
        }
        return bytes;
    }
};

}  // namespace arriero
