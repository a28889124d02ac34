// The functions of one level.
#pragma once

#include "arriero_kernels.h"

struct AttentionKernels {
    decltype(&arriero_cache_write) cache_write;
    decltype(&arriero_attention) attention;
    decltype(&arriero_attention_merge) merge;
    decltype(&arriero_full_attention) full;
};

struct Kernels {
    const char* name;
    decltype(&arriero_linear_prepare) linear_prepare;
    decltype(&arriero_linear) linear;
    decltype(&arriero_dispatch_prepare) dispatch_prepare;
    decltype(&arriero_dispatch_gate_up) dispatch_gate_up;
    decltype(&arriero_dispatch_down) dispatch_down;
    decltype(&arriero_dispatch_sum) dispatch_sum;
    const AttentionKernels* attention;
};
