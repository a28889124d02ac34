// The stored forms of a weight: how 16 bytes of a lane become exact pairs of the activation type.
#pragma once

#include <ptx.h>

namespace arriero {

enum class Scales { none, channel, block };

constexpr ARRIERO_DEVICE u32 pair(u32 bits) { return bits | bits << 16; }

// Bit patterns of the activation types. Adding an integer below 2^fraction to `base`'s bits adds it to base's value.
template <class Act>
struct Bits;

template <>
struct Bits<Half> {
    static constexpr u32 one = 0x3c00, base = 0x6400;              // 1024
    static constexpr u32 minus_base_128 = 0xe480;                  // -(1024 + 128)
    static constexpr u32 minus_base_8 = 0xe408;                    // -(1024 + 8)
    static constexpr u32 fp8_shift = 1, fp8_mask = 0x3f80;         // exponent and fraction of E4M3, in Half's place
    static constexpr u32 fp8_factor = 0x5c00;                      // 2^8: the difference of the exponents' biases
};

template <>
struct Bits<Bfloat> {
    static constexpr u32 one = 0x3f80, base = 0x4300;              // 128
    static constexpr u32 minus_base_8 = 0xc308;                    // -(128 + 8)
    static constexpr u32 fp8_shift = 4, fp8_mask = 0x07f0;
    static constexpr u32 fp8_factor = 0x7b80;                      // 2^120
};

// Each form: STEPS blocks of 32 features in a group, and the 8 values of a lane in one of them as four pairs.

template <class Act>
struct Exact {
    static constexpr Scales scales = Scales::none;
    static constexpr int STEPS = 1;
    static ARRIERO_DEVICE void widen(const Quad& raw, int, u32 (&pairs)[4]) {
        for (int i = 0; i < 4; ++i) pairs[i] = raw.word[i];
    }
};

// Offset binary bytes a c b d -> pairs (a, b), (c, d).
ARRIERO_DEVICE void widen_bytes(Half, u32 word, u32& first, u32& second) {
    constexpr u32 one = pair(Bits<Half>::one), offset = pair(Bits<Half>::minus_base_128), base = pair(0x6400);
    first = Half::multiply_add(choose_bytes(word, base, 0x5250), one, offset);
    second = Half::multiply_add(choose_bytes(word, base, 0x5351), one, offset);
}

// Bfloat has 7 bits of fraction: they take the low 7 bits, and the eighth chooses what is subtracted, 256 or 128.
ARRIERO_DEVICE u32 widen_byte_pair(u32 bytes) {
    const u32 low = (bytes & pair(0x7f)) | pair(Bits<Bfloat>::base);
    const u32 offset = (bytes & pair(0x80)) ^ pair(0xc380);
    return Bfloat::multiply_add(low, pair(Bits<Bfloat>::one), offset);
}

ARRIERO_DEVICE void widen_bytes(Bfloat, u32 word, u32& first, u32& second) {
    first = widen_byte_pair(word & pair(0xff));
    second = widen_byte_pair(word >> 8 & pair(0xff));
}

template <class Act, Scales where>
struct Int8 {
    static constexpr Scales scales = where;
    static constexpr int STEPS = 2;
    static ARRIERO_DEVICE void widen(const Quad& raw, int step, u32 (&pairs)[4]) {
        for (int i = 0; i < 2; ++i) widen_bytes(Act{}, raw.word[2 * step + i], pairs[2 * i], pairs[2 * i + 1]);
    }
};

template <class Act>
struct Fp8 {
    static constexpr Scales scales = Scales::channel;
    static constexpr int STEPS = 2;
    // E4M3 in the upper byte of each half of `bytes`; its subnormals become those of Act, so the product is exact
    static ARRIERO_DEVICE u32 widen_pair(u32 bytes) {
        using B = Bits<Act>;
        const u32 value = (bytes & pair(0x8000)) | (bytes >> B::fp8_shift & pair(B::fp8_mask));
        return Act::multiply_add(value, pair(B::fp8_factor), pair(0x8000));
    }
    static ARRIERO_DEVICE void widen(const Quad& raw, int step, u32 (&pairs)[4]) {
        for (int i = 0; i < 2; ++i) {
            const u32 word = raw.word[2 * step + i];
            pairs[2 * i] = widen_pair(word << 8);
            pairs[2 * i + 1] = widen_pair(word);
        }
    }
};

template <class Act>
struct Int4 {
    static constexpr Scales scales = Scales::block;
    static constexpr int STEPS = 4;
    static ARRIERO_DEVICE void widen(const Quad& raw, int step, u32 (&pairs)[4]) {
        using B = Bits<Act>;
        for (int i = 0; i < 4; ++i) {
            const u32 value = (raw.word[step] >> 4 * i & pair(0xf)) | pair(B::base);
            pairs[i] = Act::multiply_add(value, pair(B::one), pair(B::minus_base_8));
        }
    }
};

// A stack of matrices [E,N,row]; `block` as in arriero_experts.h.
template <class Form>
struct Stack {
    static constexpr int GROUP = 32 * Form::STEPS;  // input features in a lane quad's 64 bytes
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
    ARRIERO_DEVICE const char* row_start(int expert, int output) const {
        return weights + row(expert, output) * row_bytes();
    }
    ARRIERO_DEVICE const float* scale_start(int expert, int output) const {
        return scales + row(expert, output) * (Form::scales == Scales::block ? inputs / block : 1);
    }
    // Whether a lane's 16 bytes of a group exist.
    ARRIERO_DEVICE bool has(int group, int lane) const {
        return Form::scales != Scales::none || group * GROUP + 8 * lane < inputs;
    }
};

}  // namespace arriero
