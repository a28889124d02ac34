// The two steps of a linear layer, as arriero_kernels.h tells them.
#pragma once

#include "product.h"
#include "round_row.h"
#include "workspace.h"

namespace ARRIERO_LEVEL {

inline int32_t linear_prepare(int64_t format, int64_t block, const float* x, int64_t T, int64_t K, void* workspace,
                              int64_t part, int64_t parts) {
    if (!is_integer(format)) return 0;
    const LinearWorkspace space(workspace, format, block, T, K, parts);
    const Range rows = share(T, 1, part, parts);
    for (int64_t t = rows.begin; t < rows.end; ++t) round_row(space.rounded, t, x + t * K, 1.0f, format, 0, K);
    return 0;
}

inline int32_t linear(int64_t format, int64_t block, const float* x, const void* weight, const void* scales, float* y,
                      int64_t T, int64_t N, int64_t K, void* workspace, int64_t part, int64_t parts) {
    const LinearWorkspace space(workspace, format, block, T, K, parts);
    auto* piece = reinterpret_cast<float*>(space.pieces + (space.pieces ? part * PIECE_BYTES : 0));
    const Matrix matrix{format, Layout::rows, weight, scales, K, N};
    product(matrix, {{x, K}, space.rounded}, nullptr, T, share(N, column_unit(format, T), part, parts), {y, N}, piece);
    return 0;
}

}  // namespace ARRIERO_LEVEL
