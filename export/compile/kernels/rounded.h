// Activations rounded to int8, one scale per row and block.
#pragma once

#include "common.h"

namespace ARRIERO_LEVEL {

struct Rounded {
    int8_t* values;        // [rows, K]
    float* scales;         // [rows, K/block]
    int32_t* corrections;  // [rows, K/block]: minus the stored weights' offset times the sum of the block's values
    int64_t features, block;

    int64_t blocks() const { return features / block; }
};

}  // namespace ARRIERO_LEVEL
