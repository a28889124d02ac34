// Attention of each token to all of its sequence, as arriero_kernels.h tells it: of a picture's tiles.
#pragma once

#include "attention.h"

namespace ARRIERO_LEVEL {

inline int32_t full_attention(const float* q, const float* k, const float* v, float* out, int64_t B, int64_t L,
                              int64_t D, void* workspace, int64_t part, int64_t parts) {
    const PromptWorkspace space = full_workspace(workspace, part, L, D);
    const int64_t wide = round_up(D, LANES), blocks = (L + space.queries - 1) / space.queries;
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(D));
    for (int64_t unit = part; unit < B * blocks; unit += parts) {
        const int64_t block = unit % blocks, first = L * block / blocks, rows = L * (block + 1) / blocks - first;
        const int64_t at = unit / blocks * L * D, asked = at + first * D;
        for (int64_t i = 0; i < rows; ++i) {
            widen_row<ARRIERO_F32>(q + asked + i * D, D, space.asked + i * wide);
        }
        scale_in_place(space.asked, scale, rows * wide);
        attend_keys<ARRIERO_F32>(rows, k + at, v + at, L, D, wide, space, [&](int64_t) { return L; });
        for (int64_t i = 0; i < rows; ++i) {
            scale_in_place(space.sums + i * wide, 1.0f / space.total[i], wide);
            __builtin_memcpy(out + asked + i * D, space.sums + i * wide, D * sizeof(float));
        }
    }
    return 0;
}

}  // namespace ARRIERO_LEVEL
