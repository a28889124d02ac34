// The levels of ARRIERO_GRID4_F16: the normal grid of arriero.profiles.grids, which tells how they were found.
#pragma once

#include <stdint.h>

namespace ARRIERO_LEVEL {

constexpr int8_t GRID4[16] = {-127, -94, -72, -55, -40, -27, -15, -3, 8, 19, 31, 43, 56, 72, 91, 116};

}  // namespace ARRIERO_LEVEL
