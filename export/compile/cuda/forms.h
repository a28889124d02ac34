// The stored forms of a weight: how 16 bytes of a lane become operands of a product, and what they are multiplied with.
#pragma once

#include <ptx.h>

namespace arriero {

enum class Scales { none, channel, block };

constexpr ARRIERO_DEVICE u32 pair(u32 bits) { return bits | bits << 16; }

// Bit patterns of the activation types. Adding an integer below 2^fraction to `base`'s bits adds it to base's value.
// `wide`: a fraction holds two nibbles, so that the upper one of a byte need not be shifted: 16 times its value is there.
template <class Act>
struct Bits;

template <>
struct Bits<Half> {
    static constexpr u32 one = 0x3c00, base = 0x6400;             // 1024
    static constexpr u32 minus_base_8 = 0xe408;                   // -(1024 + 8)
    static constexpr bool wide = true;
    static constexpr u32 sixteenth = 0x2c00, minus_part_8 = 0xd480;  // -(1024 / 16 + 8)
};

template <>
struct Bits<Bfloat> {
    static constexpr u32 one = 0x3f80, base = 0x4300;  // 128
    static constexpr u32 minus_base_8 = 0xc308;        // -(128 + 8)
    static constexpr bool wide = false;
    static constexpr u32 sixteenth = 0, minus_part_8 = 0;  // not used
};

// Each form: STEPS blocks of 32 features in a group; what a lane's 8 values of a block are as operands, WORDS words,
// of weights and of tokens; the product of 16 outputs, of which each lane has two rows, with 8 tokens; and SPAN, the
// steps after which the tensor cores' own sums are moved into float32 registers, 0 where they are good for a whole row.
// DECODE_WARPS share out a row's groups. Measured on an H200: eight where a row of Scout's has 80 groups or more, four of
// int4's 40.

// Products in 16-bit floats.
template <class Act>
struct Wide {
    using Sum = float;
    static constexpr int WORDS = 4;
    static ARRIERO_DEVICE void tokens(const Quad& x, u32 (&b)[4]) {
        for (int i = 0; i < 4; ++i) b[i] = x.word[i];
    }
    static ARRIERO_DEVICE void multiply(float (&sum)[4], const u32 (&low)[4], const u32 (&high)[4], const u32 (&b)[4]) {
        Act::multiply_tile(sum, low[0], high[0], low[1], high[1], b[0], b[1]);
        Act::multiply_tile(sum, low[2], high[2], low[3], high[3], b[2], b[3]);
    }
};

template <class Act>
struct Exact : Wide<Act> {
    static constexpr Scales scales = Scales::none;
    static constexpr int STEPS = 1, SPAN = 0, DECODE_WARPS = 8;
    static ARRIERO_DEVICE void weights(const Quad& raw, int, u32 (&a)[4]) {
        for (int i = 0; i < 4; ++i) a[i] = raw.word[i];
    }
};

template <class Act>
struct Int4 : Wide<Act> {
    static constexpr Scales scales = Scales::block;
    static constexpr int STEPS = 4, SPAN = 1, DECODE_WARPS = 4;
    static ARRIERO_DEVICE void weights(const Quad& raw, int step, u32 (&a)[4]) {
        using B = Bits<Act>;
        for (int i = 0; i < 4; ++i) {
            const bool upper = B::wide && i % 2;
            const u32 moved = raw.word[step] >> 4 * (upper ? i - 1 : i);
            a[i] = Act::multiply_add(and_or(moved, pair(upper ? 0xf0 : 0xf), pair(B::base)),
                                     pair(upper ? B::sixteenth : B::one),
                                     pair(upper ? B::minus_part_8 : B::minus_base_8));
        }
    }
};

// Products in eight bits: weights as they are stored, tokens narrowed, as float16 holds their codes.
template <class Product>
struct Bytes {
    using Sum = typename Product::Sum;
    static constexpr Scales scales = Scales::channel;
    static constexpr int STEPS = 2, WORDS = 2, DECODE_WARPS = 8;
    static ARRIERO_DEVICE void weights(const Quad& raw, int step, u32 (&a)[2]) {
        for (int i = 0; i < 2; ++i) a[i] = raw.word[2 * step + i];
    }
    static ARRIERO_DEVICE void multiply(Sum (&sum)[4], const u32 (&low)[2], const u32 (&high)[2], const u32 (&b)[2]) {
        Product::multiply_tile(sum, low[0], high[0], low[1], high[1], b[0], b[1]);
    }
};

struct Int8 : Bytes<Int8Product> {
    static constexpr int SPAN = 0;  // launch.py keeps rows short enough for 32-bit sums
    // A float16 integer plus 1536 has the integer's two's complement in its low byte.
    static ARRIERO_DEVICE void tokens(const Quad& x, u32 (&b)[2]) {
        u32 moved[4];
        for (int i = 0; i < 4; ++i) moved[i] = Half::multiply_add(x.word[i], pair(Bits<Half>::one), pair(0x6600));
        for (int i = 0; i < 2; ++i) b[i] = choose_bytes(moved[2 * i], moved[2 * i + 1], 0x6420);
    }
};

struct Fp8 : Bytes<E4m3Product> {
    static constexpr int SPAN = 4;  // tensor cores add such products up in fewer bits than float32 has
    static ARRIERO_DEVICE void tokens(const Quad& x, u32 (&b)[2]) {
        for (int i = 0; i < 2; ++i) b[i] = E4m3Product::narrow(x.word[2 * i], x.word[2 * i + 1]);
    }
};

// A stack of matrices [E,N,row]; `block` as in arriero_experts.h.
template <class Form>
struct Stack {
    static constexpr int GROUP = 32 * Form::STEPS;  // input features in a lane quad's 64 bytes
    static constexpr size_t GROUP_BYTES = 64;       // from a row's group to its next
    const char* weights;
    const float* scales;
    int outputs, inputs, block;

    ARRIERO_DEVICE int groups() const { return (inputs + GROUP - 1) / GROUP; }
    ARRIERO_DEVICE int steps() const { return (inputs + 31) / 32; }
    // The exact form has no padding: its rows end with the last feature.
    ARRIERO_DEVICE size_t row_bytes() const {
        return Form::scales == Scales::none ? 2 * static_cast<size_t>(inputs) : 64 * static_cast<size_t>(groups());
    }
    ARRIERO_DEVICE size_t row(int expert, int output) const { return static_cast<size_t>(expert) * outputs + output; }
    // A lane's 16 bytes of a row's first group.
    ARRIERO_DEVICE const char* lane_start(int expert, int output, int lane) const {
        return weights + row(expert, output) * row_bytes() + 16 * lane;
    }
    ARRIERO_DEVICE const float* scale_start(int expert, int output) const {
        return scales + row(expert, output) * (Form::scales == Scales::block ? inputs / block : 1);
    }
    // The scale of a whole row.
    ARRIERO_DEVICE float scale(int expert, int output) const {
        return Form::scales == Scales::channel ? load_float(scale_start(expert, output)) : 1.0f;
    }
    // Whether a lane's 16 bytes of a group exist.
    ARRIERO_DEVICE bool has(int group, int lane) const {
        return Form::scales != Scales::none || group * GROUP + 8 * lane < inputs;
    }
};

}  // namespace arriero
