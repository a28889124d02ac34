// Kinds of integer codes: how many bits each has, what a dot reads of them, and what it is summed in.
//
// QUADS times 4 features of a panel's 16 outputs lie in STEP_BYTES; `read` gets those of LANES outputs, the v-th, and
// `weights` the quad Q of them. OFFSET is what the weights that a dot sees are above the stored numbers. A sum is begun
// from the correction of the activations that its dots see, of RUN features at most, and ended.
#pragma once

#include "grids.h"
#include "rounded.h"

namespace ARRIERO_LEVEL {

// Whose sums are of 32 bits all along.
template <int AHEAD>
struct WideSums {
    static constexpr int OFFSET = AHEAD;
    static constexpr int64_t RUN = INT64_MAX;

    static int32_t correction(Int values) { return -OFFSET * sum_int(values); }
    static Int end(Int sums) { return sums; }
};

struct EightBits : WideSums<INT8_OFFSET> {
    static constexpr int BITS = 8, QUADS = 1;
    using Raw = Weights;

    static Raw read(const uint8_t* step, int v) { return load_int8(step + v * (4 * LANES)); }
    template <int Q>
    static Weights weights(Raw raw) {
        return raw;
    }
    static Int dot(Int sums, Weights w, Quad x) { return dot8(sums, w, x); }
};

// Offset binary: 0 .. 15 for -8 .. 7. The low nibbles of bytes are of quad 0, the high ones of quad 1.
struct FourBits {
    static constexpr int BITS = 4, QUADS = 2, OFFSET = 8;
    static constexpr int64_t RUN = RUN4;
    static_assert(RUN >= SHORTEST_RUN);
    using Raw = Bytes;

    static Raw read(const uint8_t* step, int v) { return load_bytes(step + v * (4 * LANES)); }
    template <int Q>
    static Weights weights(Raw raw) {
        return nibble_weights(Q == 0 ? low_nibbles(raw) : high_nibbles(raw));
    }
    static int32_t correction(Int values) { return correction4(values, OFFSET); }
    static Int dot(Int sums, Weights w, Quad x) { return dot4(sums, w, x); }
    static Int end(Int sums) { return end4(sums); }
};

// Levels as a dot reads them, which are integers of seven bits, by a nibble that numbers them.
struct Table {
    int8_t at[16];
};

// LOWEST is the least level, which dots of unsigned weights see as 0.
template <int LOWEST>
struct GridBits : WideSums<DOTS_ARE_UNSIGNED ? -LOWEST : 0> {
    static Int dot(Int sums, Weights w, Quad x) { return dot7(sums, w, x); }
};

// Numbers of the levels of GRID4, which lie as those of FourBits.
struct Grid4Bits : GridBits<GRID4[0]> {
    static constexpr int BITS = 4, QUADS = 2;
    using Raw = Bytes;

    static constexpr Table table() {
        Table levels{};
        for (int i = 0; i < 16; ++i) levels.at[i] = static_cast<int8_t>(GRID4[i] + OFFSET);
        return levels;
    }
    static Raw read(const uint8_t* step, int v) { return load_bytes(step + v * (4 * LANES)); }
    template <int Q>
    static Weights weights(Raw raw) {
        static constexpr Table TABLE = table();
        return look_up(TABLE.at, Q == 0 ? low_nibbles(raw) : high_nibbles(raw));
    }
};

// Numbers of the levels of GRID3 or GRID2, whose low two bits lie apart from the third. The nibble that numbers a level
// of quad Q has the third bit in place Q, and the two in the half that Q is not in, so that hardly a bit is moved.
template <int N>
struct SmallGridBits : GridBits<N == 3 ? GRID3[0] : GRID2[0]> {
    static constexpr const int8_t* LEVELS = N == 3 ? GRID3 : GRID2;
    static constexpr int BITS = N, QUADS = 4;
    struct Raw {
        Bytes twos, thirds;
    };

    static constexpr Table table(int q) {
        Table levels{};
        for (int i = 0; i < 16; ++i) {
            const int two = q < 2 ? i >> 2 : i & 3, third = N == 3 ? i >> q & 1 : 0;
            levels.at[i] = static_cast<int8_t>(LEVELS[two | third << 2] + SmallGridBits::OFFSET);
        }
        return levels;
    }
    static Raw read(const uint8_t* step, int v) {
        const Bytes twos = load_bytes(step + v * (4 * LANES));
        return {twos, N == 3 ? load_nibbles(step + 64, v) : twos};
    }
    template <int Q>
    static Weights weights(Raw raw) {
        static constexpr Table TABLE = table(Q);
        const Bytes nibbles = Q % 2 == 0 ? raw.twos : high_nibbles(raw.twos);
        const Bytes twos = mask(nibbles, Q < 2 ? 12 : 3);
        return look_up(TABLE.at, N == 3 ? join(twos, mask(raw.thirds, 1 << Q)) : twos);
    }
};

template <class CODES>
constexpr int64_t STEP_BYTES = 8 * CODES::QUADS * CODES::BITS;

// Calls `function` with the kind of codes of an integer `format`.
template <class Function>
inline void with_codes(int64_t format, Function function) {
    switch (format) {
        case ARRIERO_INT8:
        case ARRIERO_INT8_F16:
            return function(EightBits{});
        case ARRIERO_INT4:
        case ARRIERO_INT4_F16:
            return function(FourBits{});
        case ARRIERO_GRID4_F16:
            return function(Grid4Bits{});
        case ARRIERO_GRID3_F16:
            return function(SmallGridBits<3>{});
        case ARRIERO_GRID2_F16:
            return function(SmallGridBits<2>{});
    }
}

}  // namespace ARRIERO_LEVEL
