// The integer tile with AMX: up to 32 rows by 32 outputs, 64 features of each at a time.
//
// Panels lie as a matrix instruction reads its second operand: four neighbouring features of 16 outputs in 64 bytes.
// Sums over a block are exact, and what follows is done in int_tile's order, so that both give the same bits.
#pragma once

#include <immintrin.h>

#include "block_scales.h"
#include "codes.h"
#include "rounded.h"

namespace ARRIERO_LEVEL {

constexpr int64_t AMX_LEAST_ROWS = 8;  // below, a tile's weights are unpacked for too few products
constexpr int64_t AMX_ROWS = 32;
constexpr int64_t AMX_DEPTH = 64;  // features

// What LDTILECFG reads (Intel's manual, volume 1, chapter 18).
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int64_t height, int64_t bytes) {
        rows[tile] = static_cast<uint8_t>(height);
        row_bytes[tile] = static_cast<uint16_t>(bytes);
    }
};

// The compiler does not know what the instructions read of memory.
inline void write_all() { __asm__ volatile("" ::: "memory"); }

// Tiles 0 and 1 are of the first 16 rows' sums, 2 and 3 of the others'; 4 and 5 of their values; 6 and 7 of weights.
inline void shape_tiles(int64_t count, int64_t depth) {
    TileShapes shapes;
    const int64_t first = smaller<int64_t>(16, count), others = count > 16 ? count - 16 : 1;
    for (int p = 0; p < 2; ++p) {
        shapes.set(p, first, 64);
        shapes.set(2 + p, others, 64);
        shapes.set(6 + p, depth / 4, 64);
    }
    shapes.set(4, first, depth);
    shapes.set(5, others, depth);
    write_all();
    _tile_loadconfig(&shapes);
}

// `depth` features from `k` of `count` rows, zeros up to a tile's; gives where they lie, `stride` apart.
inline const int8_t* tile_values(const Rounded& x, PickedRows rows, int64_t count, bool together, int64_t k,
                                 int64_t depth, int64_t tile_depth, int8_t (*copy)[AMX_DEPTH], int64_t* stride) {
    if (together && depth == tile_depth) {
        *stride = x.features;
        return x.values + rows[0] * x.features + k;
    }
    for (int64_t m = 0; m < count; ++m) {
        if (depth == AMX_DEPTH) {
            __builtin_memcpy(copy[m], x.values + rows[m] * x.features + k, AMX_DEPTH);
        } else {
            __builtin_memset(copy[m], 0, AMX_DEPTH);
            __builtin_memcpy(copy[m], x.values + rows[m] * x.features + k, depth);
        }
    }
    *stride = AMX_DEPTH;
    return copy[0];
}

// The `depth` features at `step` of a panel as a tile reads them; in place, or unpacked into `copy`.
template <class CODES>
inline const uint8_t* tile_weights(const uint8_t* step, int64_t depth, int64_t tile_depth, uint8_t* copy) {
    if (CODES::BITS == 8 && CODES::OFFSET == 128 && depth == tile_depth) return step;
    uint8_t* to = copy;
    for (int64_t k = 0; k < depth; k += 4 * CODES::QUADS, step += STEP_BYTES<CODES>) {
        typename CODES::Raw raw[16 / LANES];
        UNROLL for (int v = 0; v < 16 / LANES; ++v) raw[v] = CODES::read(step, v);
        each_of<CODES::QUADS>([&](auto number) {
            constexpr int Q = decltype(number)::value;
            UNROLL for (int v = 0; v < 16 / LANES; ++v) {
                const Weights w = CODES::template weights<Q>(raw[v]);
                static_assert(sizeof w == 4 * LANES);
                __builtin_memcpy(to + 64 * Q + v * 4 * LANES, &w, sizeof w);
            }
        });
        to += 64 * CODES::QUADS;
    }
    return copy;
}

// Adds values times weights to the sums, where there are a second 16 rows and a second panel to theirs too. Values are
// signed; weights are unless a dot sees them with an offset.
template <bool WIDE>
inline void multiply_tiles(bool tall) {
    if constexpr (DOTS_ARE_UNSIGNED) {
        _tile_dpbsud(0, 4, 6);
        if (WIDE) _tile_dpbsud(1, 4, 7);
        if (tall) _tile_dpbsud(2, 5, 6);
        if (WIDE && tall) _tile_dpbsud(3, 5, 7);
    } else {
        _tile_dpbssd(0, 4, 6);
        if (WIDE) _tile_dpbssd(1, 4, 7);
        if (tall) _tile_dpbssd(2, 5, 6);
        if (WIDE && tall) _tile_dpbssd(3, 5, 7);
    }
}

// What int_tile gives, for `count` rows.
template <class CODES, int P>
TILE void int_amx_tile(const Rounded& x, PickedRows rows, int64_t count, const uint8_t* panel, BlockScales scale,
                       Ahead ahead, float (*out)[16 * P]) {
    constexpr int V = 16 / LANES;
    const int64_t features = x.features, block = x.block, blocks = x.blocks();
    const int64_t panel_bytes = features * 2 * CODES::BITS, panel_scales = blocks * 16;
    const int64_t tile_depth = smaller(block, AMX_DEPTH);
    const bool tall = count > 16;
    bool together = true;
    for (int64_t m = 1; m < count; ++m) together = together && rows[m] == rows[0] + m;
    alignas(64) int32_t totals[AMX_ROWS][16 * P];
    alignas(64) int8_t values_copy[AMX_ROWS][AMX_DEPTH];
    alignas(64) uint8_t weights_copy[P][16 * AMX_DEPTH] = {};
    __builtin_memset(out, 0, count * sizeof out[0]);
    shape_tiles(count, tile_depth);
    const uint8_t* at = panel;
    for (int64_t j = 0; j < blocks; ++j) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        const int64_t end = (j + 1) * block;
        for (int64_t k = j * block; k < end;) {
            const int64_t depth = smaller(AMX_DEPTH, end - k), step_bytes = depth * 2 * CODES::BITS;
            const uint8_t* weights[P];
            UNROLL for (int p = 0; p < P; ++p) {
                for (int64_t line = 0; line < step_bytes; line += 64) {
                    fetch(ahead.weights + p * panel_bytes + line / 64 * ahead.stride);
                }
                weights[p] = tile_weights<CODES>(at + p * panel_bytes, depth, tile_depth, weights_copy[p]);
            }
            ahead.weights += step_bytes * ahead.stride / 64;
            int64_t stride;
            const int8_t* values =
                tile_values(x, rows, count, together, k, depth, tile_depth, values_copy, &stride);
            write_all();
            _tile_loadd(4, values, stride);
            if (tall) _tile_loadd(5, values + 16 * stride, stride);
            _tile_loadd(6, weights[0], 64);
            if constexpr (P == 2) _tile_loadd(7, weights[1], 64);
            multiply_tiles<P == 2>(tall);
            k += depth;
            at += step_bytes;
        }
        _tile_stored(0, totals[0], sizeof totals[0]);
        if constexpr (P == 2) _tile_stored(1, totals[0] + 16, sizeof totals[0]);
        if (tall) {
            _tile_stored(2, totals[16], sizeof totals[0]);
            if constexpr (P == 2) _tile_stored(3, totals[16] + 16, sizeof totals[0]);
        }
        Float scales[P * V];
        UNROLL for (int v = 0; v < P * V; ++v) {
            scales[v] = scale.load_at(v / V * panel_scales + j * 16 + v % V * LANES);
        }
        for (int64_t m = 0; m < count; ++m) {
            const int64_t part = rows[m] * blocks + j;
            const Float row_scale = all(x.scales[part]);
            const Int correction = all_int(x.corrections[part]);
            UNROLL for (int v = 0; v < P * V; ++v) {
                float* to = out[m] + v * LANES;
                const Int total = add_int(load_int(totals[m] + v * LANES), correction);
                store(to, fma(mul(scales[v], row_scale), to_float(total), load(to)));
            }
        }
    }
    _tile_release();
}

}  // namespace ARRIERO_LEVEL
