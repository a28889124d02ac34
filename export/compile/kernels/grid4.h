// The levels of ARRIERO_GRID4_F16: the normal grid of arriero.profiles.grids, which tells how they were found.
#pragma once

#include <stdint.h>

namespace ARRIERO_LEVEL {

constexpr int8_t GRID4[16] = {-65, -48, -37, -28, -21, -14, -8, -2, 4, 10, 16, 22, 29, 37, 47, 59};

}  // namespace ARRIERO_LEVEL
