// What distinguishes the two operators: where a tile's 16 outputs lie, and what becomes of their sums.
#pragma once

#include "forms.h"

namespace arriero {

struct Sizes {
    int tokens, choices, experts, hidden, ffn, block;
};

// A tile of 16 outputs of a tensor-core product: a lane holds, of output `lane / 4` of either half of 8, the columns
// 2 (lane % 4) and the one after. GateUp takes 8 gates and the same 8 ups, Down 16 neighbouring outputs.
// An item is what becomes one column: a (token, choice) pair of GateUp, a token of Down.

// What GateUp multiplies its results with, so that float16 holds those up to a million, and Down divides by. Only what is
// below 2^-10 loses precision by it, and 2^-21 at most.
template <class Act>
constexpr float INNER_SCALE = 1.0f;
template <>
constexpr float INNER_SCALE<Half> = 1.0f / 16;

template <class Act>
struct GateUp {
    static constexpr int TILE_OUTPUTS = 8;
    Sizes sizes;
    const float* score;
    u16* inner;

    ARRIERO_DEVICE int items() const { return sizes.tokens * sizes.choices; }
    ARRIERO_DEVICE int width() const { return sizes.ffn; }
    ARRIERO_DEVICE int matrix_outputs() const { return 2 * sizes.ffn; }
    ARRIERO_DEVICE int matrix_inputs() const { return sizes.hidden; }
    ARRIERO_DEVICE int passes() const { return 1; }
    ARRIERO_DEVICE int id_of(int item, int) const { return item; }
    ARRIERO_DEVICE int source_row(int item, int) const { return item / sizes.choices; }
    ARRIERO_DEVICE int half(int first, int which) const { return first + which * sizes.ffn; }

    // Whether an item of no expert leaves its row as it is.
    static constexpr bool skips_strays = true;

    // `gate` and `up` of output `first + lane / 4`, of one item.
    ARRIERO_DEVICE void store(int item, int first, int lane, float gate, float up) const {
        const float s = load_float(score + item);
        const float g = gate * s, sigmoid = reciprocal(1.0f + exponential2(-1.4426950408889634f * g));
        const float value = g * sigmoid * (up * (s * INNER_SCALE<Act>));
        store_half(inner + static_cast<size_t>(item) * sizes.ffn + first + lane / 4, Act::round(value));
    }
};

// `CODES`: inner is codes, whose scales say all.
template <class Act, bool CODES>
struct Down {
    static constexpr int TILE_OUTPUTS = 16;
    static constexpr float SCALE = CODES ? 1.0f : 1 / INNER_SCALE<Act>;
    Sizes sizes;
    u16* y;

    ARRIERO_DEVICE int items() const { return sizes.tokens; }
    ARRIERO_DEVICE int width() const { return sizes.hidden; }
    ARRIERO_DEVICE int matrix_outputs() const { return sizes.hidden; }
    ARRIERO_DEVICE int matrix_inputs() const { return sizes.ffn; }
    ARRIERO_DEVICE int passes() const { return sizes.choices; }
    ARRIERO_DEVICE int id_of(int item, int choice) const { return item * sizes.choices + choice; }
    ARRIERO_DEVICE int source_row(int item, int choice) const { return id_of(item, choice); }
    ARRIERO_DEVICE int half(int first, int which) const { return first + 8 * which; }

    static constexpr bool skips_strays = false;

    ARRIERO_DEVICE void store(int item, int first, int lane, float low, float high) const {
        u16* out = y + static_cast<size_t>(item) * sizes.hidden + first + lane / 4;
        store_half(out, Act::round(low * SCALE));
        store_half(out + 8, Act::round(high * SCALE));
    }
};

}  // namespace arriero
