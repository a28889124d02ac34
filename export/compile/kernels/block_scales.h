// The scales of integer weights, in either type that they are stored in.
#pragma once

#include "common.h"

namespace ARRIERO_LEVEL {

struct BlockScales {
    const void* base;
    bool halves;  // float16, else float32

    const void* at(int64_t i) const { return static_cast<const uint8_t*>(base) + i * (halves ? 2 : 4); }
    BlockScales from(int64_t i) const { return {at(i), halves}; }
    Float load_at(int64_t i) const {
        return halves ? load_f16(static_cast<const uint16_t*>(base) + i) : load(static_cast<const float*>(base) + i);
    }
};

}  // namespace ARRIERO_LEVEL
