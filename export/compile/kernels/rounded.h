// Activations rounded to int8, one scale per row and block.
#pragma once

#include "common.h"

namespace ARRIERO_LEVEL {

constexpr int64_t SHORTEST_RUN = 64;  // of any level

struct Rounded {
    int8_t* values;        // [rows, K]
    float* scales;         // [rows, K/block]
    int32_t* corrections;  // [rows, K/block, runs of a block]: what sums of dots begin from, see codes.h
    int64_t features, block;

    int64_t blocks() const { return features / block; }
    // The rows from `row` on, which were rounded for weights with such a `run`.
    Rounded from(int64_t row, int64_t run) const {
        const int64_t first = row * blocks();
        return {values + row * features, scales + first, corrections + first * runs(run), features, block};
    }
    int64_t runs(int64_t run) const { return run < block ? (block + run - 1) / run : 1; }
};

// Rows from the `first`-th of `order` on, or of all rows if that is null. An array of them, filled for each tile, would
// be read in wider pieces than it was written in, which waits for all that was stored before.
struct PickedRows {
    const int64_t* order;
    int64_t first;

    int64_t operator[](int64_t m) const { return order ? order[first + m] : first + m; }
};

// What a tile asks for beforehand, in each of its panels: of a stream what comes next, of panels that other rows meet
// too its share of the panels after them.
struct Ahead {
    const uint8_t* weights;  // of the first panel
    int64_t stride;          // bytes from there to what is asked for once 64 bytes are multiplied; 0 where nothing comes
};

}  // namespace ARRIERO_LEVEL
