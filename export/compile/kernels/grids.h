// The levels of the ARRIERO_GRID formats: the normal grids of arriero.profiles.grids, which tells how they were found.
#pragma once

#include <stdint.h>

namespace ARRIERO_LEVEL {

constexpr int8_t GRID4[16] = {-65, -48, -37, -28, -21, -14, -8, -2, 4, 10, 16, 22, 29, 37, 47, 59};
constexpr int8_t GRID3[8] = {-66, -40, -23, -9, 4, 17, 32, 53};
constexpr int8_t GRID2[4] = {-69, -24, 11, 52};

}  // namespace ARRIERO_LEVEL
