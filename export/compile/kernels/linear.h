// The two steps of a linear layer, as arriero_kernels.h tells them.
#pragma once

#include "product.h"
#include "round_row.h"
#include "workspace.h"

namespace ARRIERO_LEVEL {

// Rounds x [K] into the row 2 t, and into the next what that leaves, for which `left` [K] is scratch.
inline void round_twice(const Rounded& to, int64_t t, const float* x, float* left, int64_t format) {
    const int64_t row = 2 * t;
    round_row(to, row, x, 1.0f, format, 0, to.features);
    const int8_t* values = to.values + row * to.features;
    const float* scale = to.scales + row * to.blocks();
    for (int64_t begin = 0; begin < to.features; begin += to.block, ++scale) {
        for (int64_t i = begin; i < begin + to.block; ++i) left[i] = x[i] - values[i] * *scale;
    }
    round_row(to, row + 1, left, 1.0f, format, 0, to.features);
}

inline int32_t linear_prepare(int64_t format, int64_t block, const float* x, int64_t T, int64_t K, void* workspace,
                              int64_t part, int64_t parts) {
    if (!is_integer(format)) return 0;
    const LinearWorkspace space(workspace, format, block, T, 0, K, part, parts);
    const Range rows = share(T, 1, part, parts);
    for (int64_t t = rows.begin; t < rows.end; ++t) {
        if (is_twice(format)) {
            round_twice(space.rounded, t, x + t * K, space.left, plain(format));
        } else {
            round_row(space.rounded, t, x + t * K, 1.0f, format, 0, K);
        }
    }
    return 0;
}

inline int32_t linear(int64_t format, int64_t block, const float* x, const void* weight, const void* scales, float* y,
                      int64_t T, int64_t N, int64_t K, void* workspace, int64_t part, int64_t parts) {
    const LinearWorkspace space(workspace, format, block, T, N, K, part, parts);
    const Matrix matrix{plain(format), Layout::rows, weight, scales, K, N};
    if (!is_twice(format)) {
        auto* piece = reinterpret_cast<float*>(space.pieces + (space.pieces ? part * PIECE_BYTES : 0));
        product(matrix, {{x, K}, space.rounded}, nullptr, T, share(N, column_unit(format, T), part, parts), {y, N},
                piece);
        return 0;
    }
    int64_t run = 0;
    with_codes(matrix.format, [&](auto codes) { run = decltype(codes)::RUN; });
    const Range columns = share(N, column_unit(matrix.format, T), part, parts);
    for (int64_t first = 0; first < T; first += LinearWorkspace::TOKENS) {
        const int64_t count = smaller(LinearWorkspace::TOKENS, T - first);
        const Input rows{{}, space.rounded.from(2 * first, run)};
        product(matrix, rows, nullptr, 2 * count, columns, {space.products, N}, nullptr);
        for (int64_t t = 0; t < count; ++t) {
            const float *one = space.products + 2 * t * N, *other = one + N;
            float* sum = y + (first + t) * N;
            for (int64_t n = columns.begin; n < columns.end; ++n) sum[n] = one[n] + other[n];
        }
    }
    return 0;
}

}  // namespace ARRIERO_LEVEL
