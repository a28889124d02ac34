// The four steps of expert dispatch, as arriero_kernels.h tells them. A row is one (token, choice) pair.
#pragma once

#include "exponential.h"
#include "product.h"
#include "round_row.h"
#include "workspace.h"

namespace ARRIERO_LEVEL {

// Counting sort of rows by expert; those of no expert come last, as group E.
inline void group_rows(const int64_t* expert_id, int64_t rows, int64_t E, int64_t* start, int64_t* order) {
    const auto group = [&](int64_t row) { return expert_id[row] >= 0 && expert_id[row] < E ? expert_id[row] : E; };
    for (int64_t e = 0; e <= E + 1; ++e) start[e] = 0;
    for (int64_t row = 0; row < rows; ++row) ++start[group(row) + 1];
    for (int64_t e = 0; e <= E; ++e) start[e + 1] += start[e];
    // each start moves to the next group's while rows are placed, so all are one group ahead at the end
    for (int64_t row = 0; row < rows; ++row) order[start[group(row)]++] = row;
    for (int64_t e = E + 1; e > 0; --e) start[e] = start[e - 1];
    start[0] = 0;
}

inline void scale_row(const float* x, float factor, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(out + i, mul(load(x + i), all(factor)));
    for (; i < count; ++i) out[i] = x[i] * factor;
}

inline int32_t dispatch_prepare(int64_t gate_up_format, int64_t gate_up_block, int64_t down_format, int64_t down_block,
                                const float* x, const int64_t* expert_id, const float* score, int64_t T, int64_t R,
                                int64_t E, int64_t H, int64_t F, void* workspace, int64_t part, int64_t parts) {
    const DispatchWorkspace space(workspace, gate_up_format, gate_up_block, down_format, down_block, T, R, E, H, F,
                                  parts);
    if (part == 0) group_rows(expert_id, T * R, E, space.start, space.order);
    const Range rows = share(T * R, 1, part, parts);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const float* token = x + row / R * H;
        if (is_integer(gate_up_format)) {
            round_row(space.rounded, row, token, score[row], gate_up_format, 0, H);
        } else {
            scale_row(token, score[row], H, space.scaled + row * H);
        }
    }
    return 0;
}

// A matrix of the expert whose record this is.
inline Matrix in_record(int64_t format, const void* record, int64_t at, int64_t scales_at, int64_t features,
                        int64_t outputs) {
    const auto* bytes = static_cast<const uint8_t*>(record);
    return {format, Layout::columns, bytes + at, bytes + scales_at, features, outputs};
}

// Where down's results go: with one choice per token, its row is the token's.
inline Rows<float> down_rows(const DispatchWorkspace& space, float* y, int64_t R, int64_t H) {
    return R == 1 ? Rows<float>{y, H} : Rows<float>{space.products, space.wide};
}

// silu(gate) * up of features [columns.begin, columns.end) of one row.
inline void combine_row(bool panels, const float* products, int64_t F, Range columns, float* inner) {
    if (!panels) {
        silu_times(products + columns.begin, products + F + columns.begin, inner + columns.begin,
                   columns.end - columns.begin);
        return;
    }
    for (int64_t f = columns.begin; f < columns.end; f += 16) {
        silu_times(products + 2 * f, products + 2 * f + 16, inner + f, smaller<int64_t>(16, columns.end - f));
    }
}

// Those of an expert's rows in the order that are among `picked`.
inline Range rows_among(const DispatchWorkspace& space, int64_t expert, Range picked) {
    const int64_t first = space.start[expert];
    return {first < picked.begin ? picked.begin : first, smaller(space.start[expert + 1], picked.end)};
}

inline int32_t dispatch_gate_up(int64_t gate_up_format, int64_t gate_up_block, int64_t down_format, int64_t down_block,
                                const void* const* records, int64_t first, int64_t end, int64_t at, int64_t scales_at,
                                int64_t T, int64_t R, int64_t E, int64_t H, int64_t F, void* workspace, int64_t part,
                                int64_t parts) {
    const DispatchWorkspace space(workspace, gate_up_format, gate_up_block, down_format, down_block, T, R, E, H, F,
                                  parts);
    auto* piece = reinterpret_cast<float*>(space.pieces + part * PIECE_BYTES);
    const bool panels = gate_up_format >= ARRIERO_E4M3, rounds = is_integer(down_format);
    const int64_t outputs = panels ? 2 * round_up(F, 16) : 2 * F;
    const Input x{{space.scaled, H}, space.rounded};
    const Rows<float> out{space.products, space.wide};
    for (int64_t e = 0; e < E; ++e) {
        const Range rows = rows_among(space, e, {first, end});
        const int64_t *order = space.order + rows.begin, count = rows.end - rows.begin;
        if (count <= 0 || !records[e]) continue;
        // whole blocks of the next product's rounding
        int64_t unit = column_unit(gate_up_format, count);
        if (rounds && unit < down_block) unit = down_block;
        const Range columns = share(F, unit, part, parts);
        const Matrix expert = in_record(gate_up_format, records[e], at, scales_at, H, outputs);
        if (panels) {
            product(expert, x, order, count, {2 * columns.begin, 2 * round_up(columns.end, 16)}, out, piece);
        } else {
            product(expert, x, order, count, columns, out, piece);
            product(expert, x, order, count, {F + columns.begin, F + columns.end}, out, piece);
        }
        for (int64_t i = 0; i < count; ++i) {
            float* inner = space.inner + order[i] * F;
            combine_row(panels, space.products + order[i] * space.wide, F, columns, inner);
            if (rounds) round_row(space.inner_rounded, order[i], inner, 1.0f, down_format, columns.begin, columns.end);
        }
    }
    return 0;
}

inline int32_t dispatch_down(int64_t gate_up_format, int64_t gate_up_block, int64_t down_format, int64_t down_block,
                             const void* const* records, int64_t first, int64_t end, int64_t at, int64_t scales_at,
                             float* y, int64_t T, int64_t R, int64_t E, int64_t H, int64_t F, void* workspace,
                             int64_t part, int64_t parts) {
    const DispatchWorkspace space(workspace, gate_up_format, gate_up_block, down_format, down_block, T, R, E, H, F,
                                  parts);
    auto* piece = reinterpret_cast<float*>(space.pieces + part * PIECE_BYTES);
    const Input x{{space.inner, F}, space.inner_rounded};
    const Rows<float> out = down_rows(space, y, R, H);
    const Range columns = share(H, 64, part, parts);
    for (int64_t e = 0; e < E; ++e) {
        const Range rows = rows_among(space, e, {first, end});
        const int64_t *order = space.order + rows.begin, count = rows.end - rows.begin;
        if (count <= 0 || !records[e]) continue;
        product(in_record(down_format, records[e], at, scales_at, F, H), x, order, count, columns, out, piece);
    }
    return 0;
}

inline int32_t dispatch_sum(int64_t gate_up_format, int64_t gate_up_block, int64_t down_format, int64_t down_block,
                            float* y, int64_t T, int64_t R, int64_t E, int64_t H, int64_t F, void* workspace,
                            int64_t part, int64_t parts) {
    const DispatchWorkspace space(workspace, gate_up_format, gate_up_block, down_format, down_block, T, R, E, H, F,
                                  parts);
    const Rows<float> out = down_rows(space, y, R, H);
    const Range columns = share(H, 64, part, parts);
    const int64_t width = columns.end - columns.begin;
    for (int64_t i = space.start[E]; i < T * R; ++i) {
        __builtin_memset(out[space.order[i]] + columns.begin, 0, width * sizeof(float));
    }
    if (R == 1) return 0;
    for (int64_t t = 0; t < T; ++t) {
        float* sum = y + t * H;
        for (int64_t n = columns.begin; n < columns.end; ++n) {
            float total = 0;
            for (int64_t r = 0; r < R; ++r) total += out[t * R + r][n];
            sum[n] = total;
        }
    }
    return 0;
}

}  // namespace ARRIERO_LEVEL
