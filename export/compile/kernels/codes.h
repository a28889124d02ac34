// Kinds of integer codes: how many bits each has, what a dot reads of them, and what it is summed in.
#pragma once

#include "common.h"

namespace ARRIERO_LEVEL {

struct EightBits {
    static constexpr int BITS = 8;
};

// Offset binary: 0 .. 15 for -8 .. 7.
struct FourBits {
    static constexpr int BITS = 4;
    static constexpr int64_t FEATURES = FEW_FEATURES;  // whose dots `Sums` holds
    using Sums = Few;

    static void load(const uint8_t* p, Weights& low, Weights& high) { load_int4(p, low, high); }
    static Sums begin(Int sums) { return begin_few(sums); }
    static Sums dot(Sums sums, Weights w, Quad x) { return dot4(sums, w, x); }
    static Int end(Int before, Sums sums) { return end_few(before, sums); }
};

// Numbers of the levels of GRID4, which are integers of seven bits.
struct GridBits {
    static constexpr int BITS = 4;
    static constexpr int64_t FEATURES = INT64_MAX;
    using Sums = Int;

    static void load(const uint8_t* p, Weights& low, Weights& high) { load_grid4(p, low, high); }
    static Sums begin(Int sums) { return sums; }
    static Sums dot(Sums sums, Weights w, Quad x) { return dot7(sums, w, x); }
    static Int end(Int, Sums sums) { return sums; }
};

}  // namespace ARRIERO_LEVEL
