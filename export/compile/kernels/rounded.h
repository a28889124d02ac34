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
    int64_t runs(int64_t run) const { return run < block ? (block + run - 1) / run : 1; }
};

}  // namespace ARRIERO_LEVEL
