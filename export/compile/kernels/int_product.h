// Products of rounded activations with panels of 8 to 2 bits: exact int32 within a block, float32 across blocks.
#pragma once

#include "block_scales.h"
#include "codes.h"
#include "rounded.h"
#ifdef __AMX_INT8__
#include "int_amx_tile.h"
#endif
#ifdef __ARM_FEATURE_MATMUL_INT8
#include "int_pair_tile.h"
#endif

namespace ARRIERO_LEVEL {

// out[m][16p + n] = product of row rows[m] with output n of panel p, for M rows and P panels. What comes after
// them is asked for meanwhile.
template <class CODES, int M, int P>
TILE void int_tile(const Rounded& x, PickedRows rows, const uint8_t* panel, BlockScales scale, Ahead ahead,
                   float out[M][16 * P]) {
    constexpr int V = 16 / LANES, PV = P * V;
    constexpr bool TWO_CHAINS = M * PV == 1;  // where all dots of a block would wait for one another
    const int64_t features = x.features, block = x.block, blocks = x.blocks();
    const int64_t panel_bytes = features * 2 * CODES::BITS, panel_scales = blocks * 16;
    const int8_t* values[M];
    const float* row_scales[M];
    const int32_t* corrections[M];
    for (int m = 0; m < M; ++m) {
        values[m] = x.values + rows[m] * features;
        row_scales[m] = x.scales + rows[m] * blocks;
        corrections[m] = x.corrections + rows[m] * blocks * x.runs(CODES::RUN);
    }
    Float sums[M][PV];
    UNROLL for (int m = 0; m < M; ++m) { UNROLL for (int v = 0; v < PV; ++v) sums[m][v] = all(0.0f); }
    const uint8_t* at = panel;
    const int64_t scales_ahead = ahead.stride ? P : 0;
    const auto ask = [&]() __attribute__((always_inline)) {
        UNROLL for (int p = 0; p < P; ++p) fetch(ahead.weights + p * panel_bytes);
        if constexpr (P == 1 && STEP_BYTES<CODES> > 64) fetch(ahead.weights + 64);
        ahead.weights += ahead.stride * STEP_BYTES<CODES> / 64;
    };
    // the products with the next run of `count` features from k on
    const auto sum_run = [&](int64_t& k, int64_t count, Int (&totals)[M][PV]) __attribute__((always_inline)) {
        Int run[M][PV], odd = all_int(0);
        UNROLL for (int m = 0; m < M; ++m) {
            const Int correction = all_int(*corrections[m]++);
            UNROLL for (int v = 0; v < PV; ++v) run[m][v] = correction;
        }
        for (const int64_t stop = k + count; k < stop; k += 4 * CODES::QUADS, at += STEP_BYTES<CODES>) {
            ask();
            typename CODES::Raw raw[PV];
            UNROLL for (int v = 0; v < PV; ++v) raw[v] = CODES::read(at + v / V * panel_bytes, v % V);
            each_of<CODES::QUADS>([&](auto number) {
                constexpr int Q = decltype(number)::value;
                Weights w[PV];
                UNROLL for (int v = 0; v < PV; ++v) w[v] = CODES::template weights<Q>(raw[v]);
                UNROLL for (int m = 0; m < M; ++m) {
                    const Quad a = quad(values[m] + k + 4 * Q);
                    UNROLL for (int v = 0; v < PV; ++v) {
                        Int& sum = TWO_CHAINS && Q % 2 == 1 ? odd : run[m][v];
                        sum = CODES::dot(sum, w[v], a);
                    }
                }
            });
        }
        if (TWO_CHAINS) run[0][0] = add_int(run[0][0], odd);
        UNROLL for (int m = 0; m < M; ++m) {
            UNROLL for (int v = 0; v < PV; ++v) totals[m][v] = CODES::end(run[m][v]);
        }
    };
    const auto add_blocks = [&](int64_t length) __attribute__((always_inline)) {
        for (int64_t j = 0; j < blocks; ++j) {
            if constexpr (P > 1) {
                UNROLL for (int p = 0; p < P; ++p) fetch(scale.at((p + scales_ahead) * panel_scales + j * 16));
            }
            Int totals[M][PV];
            int64_t k = j * length;
            const int64_t end = k + length;
            sum_run(k, smaller(end - k, CODES::RUN), totals);
            if constexpr (CODES::RUN < INT64_MAX) {
                while (k < end) {
                    Int more[M][PV];
                    sum_run(k, smaller(end - k, CODES::RUN), more);
                    UNROLL for (int m = 0; m < M; ++m) {
                        UNROLL for (int v = 0; v < PV; ++v) totals[m][v] = add_int(totals[m][v], more[m][v]);
                    }
                }
            }
            Float scales[PV];
            UNROLL for (int v = 0; v < PV; ++v) {
                scales[v] = scale.load_at(v / V * panel_scales + j * 16 + v % V * LANES);
            }
            UNROLL for (int m = 0; m < M; ++m) {
                const Float row_scale = all(row_scales[m][j]);
                UNROLL for (int v = 0; v < PV; ++v) {
                    sums[m][v] = fma(mul(scales[v], row_scale), to_float(totals[m][v]), sums[m][v]);
                }
            }
        }
    };
    if (UNROLLS_BLOCKS && (M <= 2 || CODES::RUN < INT64_MAX) && block == 32) {
        add_blocks(32);
    } else {
        add_blocks(block);
    }
    UNROLL for (int m = 0; m < M; ++m) { UNROLL for (int v = 0; v < PV; ++v) store(out[m] + v * LANES, sums[m][v]); }
}

// So few rows read panel after panel, a single stream from memory; with more there is time for two panels.
constexpr int64_t STREAM_ROWS = 4;

// Columns [begin, end) of out = x W^T for `count` rows, picked from x and out by `order`
// (null: the first). `begin` is a multiple of 16.
template <class CODES>
inline void int_product(const Rounded& x, const int64_t* order, int64_t count, const uint8_t* weight,
                        BlockScales scales, Range columns, Rows<float> out) {
    const auto panels = [&](int64_t column, auto wide) {
        constexpr int P = decltype(wide)::value;
        const int64_t width = smaller<int64_t>(16 * P, columns.end - column);
        const int64_t panel_bytes = x.features * 2 * CODES::BITS;
        const uint8_t* panel = weight + column / 16 * panel_bytes;
        const BlockScales scale = scales.from(column * x.blocks());
        for (int64_t i = 0; i < count;) {
            const PickedRows rows{order, i};
            const auto ahead = [&](int64_t M) -> Ahead {
                if (P == 1 && count <= STREAM_ROWS) {
                    constexpr int64_t BYTES = FETCH_AHEAD<CODES::BITS>;
                    return {panel + BYTES, BYTES > 0 ? 64 : 0};
                }
                if (column + 16 * P >= columns.end) return {panel, 0};
                return {panel + P * panel_bytes + panel_bytes * i / count, (64 * M + count - 1) / count};
            };
#ifdef __AMX_INT8__
            if (count >= AMX_LEAST_ROWS) {
                // as many rows as the other tiles of this group have
                const int64_t tiles = (count + AMX_ROWS - 1) / AMX_ROWS, M = smaller((count + tiles - 1) / tiles, count - i);
                alignas(64) float tile[AMX_ROWS][16 * P];
                int_amx_tile<CODES, P>(x, rows, M, panel, scale, ahead(M), tile);
                for (int64_t m = 0; m < M; ++m) copy_numbers<16 * P>(out[i + m] + column, tile[m], width);
                i += M;
                continue;
            }
#endif
            i += with_rows<INT_ROWS>(count - i, [&](auto tall) {
                constexpr int M = decltype(tall)::value;
                float tile[M][16 * P];
                // to be written without a wait when the tile is done
                UNROLL for (int m = 0; m < M; ++m) {
                    UNROLL for (int p = 0; p < P; ++p) fetch(out[i + m] + column + 16 * p);
                }
#ifdef __ARM_FEATURE_MATMUL_INT8
                if constexpr (M > 1) {
                    int_pair_tile<CODES, M, P>(x, rows, panel, scale, tile);
                } else {
                    int_tile<CODES, M, P>(x, rows, panel, scale, ahead(M), tile);
                }
#else
                int_tile<CODES, M, P>(x, rows, panel, scale, ahead(M), tile);
#endif
                for (int m = 0; m < M; ++m) copy_numbers<16 * P>(out[i + m] + column, tile[m], width);
            });
        }
    };
    int64_t column = columns.begin;
    if constexpr (INT_PANELS == 2) {
        for (; count > STREAM_ROWS && column + 16 < columns.end; column += 32) panels(column, Constant<2>{});
    }
    for (; column < columns.end; column += 16) panels(column, Constant<1>{});
}

}  // namespace ARRIERO_LEVEL
