// Many tokens: a block takes 64 items of one expert and 128 outputs; tokens lie in shared memory, weights in lanes.
//
// Every block finds its items by itself, from expert_id. Where a token's experts are summed (k > 1 in Down), a block
// takes 64 neighbouring tokens instead and adds one expert after the other, so that the sum has one order; its work
// then grows with the number of experts that these tokens choose.
#pragma once

#include "operators.h"

namespace arriero {

constexpr int PREFILL_WARPS = 4, PREFILL_THREADS = 32 * PREFILL_WARPS;
constexpr int COLUMNS = 64, COLUMN_TILES = COLUMNS / 8, ROW_TILES = 2, MAX_EXPERTS = 512;

template <class Form>
struct PrefillShared {
    static constexpr int TOKEN_DEPTH = 3;                                                // steps of 32 features
    static constexpr int DEPTH = (TOKEN_DEPTH - 1 + Form::STEPS - 1) / Form::STEPS + 1;  // groups
    Quad weights[DEPTH][ROW_TILES][2][PREFILL_THREADS];
    Quad tokens[TOKEN_DEPTH][COLUMNS][4];
    float scales[Form::scales == Scales::block ? DEPTH : 1][ROW_TILES][2][PREFILL_THREADS / 4][Form::STEPS];
    int counts[MAX_EXPERTS + 1], warp_counts[PREFILL_WARPS];
    int tile_group, tile_start;
    int items[COLUMNS], count;
    int ids[COLUMNS], rows[COLUMNS];
};

// Finds the items of the block's tile: tiles of 64 are counted expert by expert, strays (of no expert) last.
// False if there is no such tile.
template <class Form, class Op>
ARRIERO_DEVICE bool find_tile(PrefillShared<Form>& shared, const Op& op, const int* expert_id, int tile, int& group) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, items = op.items();
    const int experts = op.sizes.experts;
    const auto group_of = [&](int item) {
        const int id = load_int(expert_id + item);
        return id >= 0 && id < experts ? id : experts;
    };
    for (int e = thread; e <= experts; e += PREFILL_THREADS) shared.counts[e] = 0;
    block_barrier();
    for (int item = thread; item < items; item += PREFILL_THREADS) count_shared(&shared.counts[group_of(item)]);
    block_barrier();
    if (warp == 0) {
        int before = 0, found = -1, start = 0;
        for (int base = 0; base <= experts && found < 0; base += 32) {
            const int count = base + lane <= experts ? shared.counts[base + lane] : 0;
            const int tiles = (count + COLUMNS - 1) / COLUMNS;
            int upto = tiles;
            for (int by = 1; by < 32; by *= 2) {
                const int other = warp_shift_up(upto, by);
                if (lane >= by) upto += other;
            }
            upto += before;
            const u32 beyond = warp_ballot(upto > tile);
            before = warp_from(upto, 31);
            if (beyond) {
                const int which = lowest_bit(beyond);
                found = base + which;
                start = (tile - (warp_from(upto, which) - warp_from(tiles, which))) * COLUMNS;
            }
        }
        if (lane == 0) {
            shared.tile_group = found;
            shared.tile_start = start;
        }
    }
    block_barrier();
    group = shared.tile_group;
    if (group < 0) return false;
    const int from = shared.tile_start, whole = shared.counts[group];
    const int stop = whole < from + COLUMNS ? whole : from + COLUMNS;
    int rank = 0;  // of the next item of the group
    for (int base = 0; base < items && rank < stop; base += PREFILL_THREADS) {
        const bool match = base + thread < items && group_of(base + thread) == group;
        const u32 mask = warp_ballot(match);
        if (lane == 0) shared.warp_counts[warp] = count_bits(mask);
        block_barrier();
        int place = rank + count_bits(mask & ((1u << lane) - 1));
        for (int w = 0; w < PREFILL_WARPS; ++w) {
            if (w < warp) place += shared.warp_counts[w];
            rank += shared.warp_counts[w];
        }
        if (match && place >= from && place < stop) shared.items[place - from] = base + thread;
        block_barrier();
    }
    if (thread == 0) shared.count = stop - from;
    block_barrier();
    return true;
}

// total += the product of this warp's 32 outputs of `expert` with the source rows of the columns. `tiles` columns of 8
// are in use. All threads of the block must call it, and a barrier must lie before shared.rows change.
template <class Form, class Op>
ARRIERO_DEVICE void prefill_product(PrefillShared<Form>& shared, const Op& op, const Stack<Form>& stack,
                                    const u16* source, int expert, int first, int tiles,
                                    float (&total)[ROW_TILES][COLUMN_TILES][4]) {
    using Shared = PrefillShared<Form>;
    constexpr int STEPS = Form::STEPS, GROUP = Stack<Form>::GROUP, DEPTH = Shared::DEPTH;
    const int thread = threadIdx.x, lane = thread % 32, quad = lane / 4, mine = lane % 4;
    const int steps = stack.steps();
    // row tiles past the end read the first one instead, and are never stored
    const char* weights[ROW_TILES][2];
    const float* scales[ROW_TILES][2];
    float channel[ROW_TILES][2];
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile) {
        const int start = first + tile * Op::TILE_OUTPUTS;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int output = op.half(start < op.width() ? start : 0, half) + quad;
            weights[tile][half] = stack.lane_start(expert, output, mine);
            if (Form::scales == Scales::block) scales[tile][half] = stack.scale_start(expert, output);
            channel[tile][half] = stack.scale(expert, output);
        }
    }
    // a column's row is read in pieces of 8 features by neighbouring threads
    const u16* tokens[2];
    bool present[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = shared.rows[(thread + i * PREFILL_THREADS) / 4];
        present[i] = row >= 0;
        tokens[i] = source + static_cast<size_t>(row < 0 ? 0 : row) * stack.inputs;
    }

    const auto request = [&](int step) {
        if (step < steps) {
            const int slot = step % Shared::TOKEN_DEPTH, feature = 32 * step + 8 * mine;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const bool valid = present[i] && feature < stack.inputs;
                copy_tokens(&shared.tokens[slot][(thread + i * PREFILL_THREADS) / 4][mine],
                            tokens[i] + (valid ? feature : 0), valid);
            }
            if (step % STEPS == 0) {
                const int group = step / STEPS, place = group % DEPTH;
#pragma unroll
                for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        copy_weights(&shared.weights[place][tile][half][thread],
                                     weights[tile][half] + Stack<Form>::GROUP_BYTES * group, stack.has(group, mine));
                        if (Form::scales == Scales::block && mine < STEPS) {
                            const int start = group * GROUP + 32 * mine;
                            const bool valid = start < stack.inputs;
                            copy_scale(&shared.scales[place][tile][half][thread / 4][mine],
                                       scales[tile][half] + (valid ? start / stack.block : 0), valid);
                        }
                    }
                }
            }
        }
        commit_copies();
    };

    typename Form::Sum part[ROW_TILES][COLUMN_TILES][4] = {};
    const int span = Form::scales == Scales::block ? stack.block / 32 : Form::SPAN;
    for (int step = 0; step < Shared::TOKEN_DEPTH - 1; ++step) request(step);
    for (int begin = 0; begin < steps; begin += STEPS) {
        const int place = begin / STEPS % DEPTH;
#pragma unroll
        for (int within = 0; within < STEPS; ++within) {
            const int step = begin + within;
            if (step >= steps) break;
            wait_copies<Shared::TOKEN_DEPTH - 2>();
            block_barrier();
            request(step + Shared::TOKEN_DEPTH - 1);
            u32 a[ROW_TILES][2][Form::WORDS];
#pragma unroll
            for (int tile = 0; tile < ROW_TILES; ++tile) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    Form::weights(shared.weights[place][tile][half][thread], within, a[tile][half]);
                }
            }
            const int slot = step % Shared::TOKEN_DEPTH;
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; ++n) {
                if (n >= tiles) break;
                u32 b[Form::WORDS];
                Form::tokens(shared.tokens[slot][8 * n + quad][mine], b);
#pragma unroll
                for (int tile = 0; tile < ROW_TILES; ++tile) {
                    if constexpr (Form::scales == Scales::none) {
                        Form::multiply(total[tile][n], a[tile][0], a[tile][1], b);
                    } else {
                        Form::multiply(part[tile][n], a[tile][0], a[tile][1], b);
                    }
                }
            }
            if (Form::scales == Scales::none) continue;
            if (step + 1 < steps && (span == 0 || (step + 1) % span != 0)) continue;
#pragma unroll
            for (int tile = 0; tile < ROW_TILES; ++tile) {
                float scale[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    scale[half] = Form::scales == Scales::block
                                      ? shared.scales[place][tile][half][thread / 4][within]
                                      : channel[tile][half];
                }
#pragma unroll
                for (int n = 0; n < COLUMN_TILES; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        total[tile][n][i] += static_cast<float>(part[tile][n][i]) * scale[i / 2];
                        part[tile][n][i] = 0;
                    }
                }
            }
        }
    }
    wait_copies<0>();
}

// Grid: (tiles of items, width / (PREFILL_WARPS * ROW_TILES * TILE_OUTPUTS) rounded up). Tiles of items are at most
// items / 64 + experts + 1, or tokens / 64 rounded up where experts are summed.
template <class Form, class Op>
ARRIERO_DEVICE void prefill(const Op& op, const int* expert_id, const u16* source, const Stack<Form>& stack) {
    ARRIERO_SHARED(PrefillShared<Form>, shared);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, tile = blockIdx.x;
    const int first = (blockIdx.y * PREFILL_WARPS + warp) * ROW_TILES * Op::TILE_OUTPUTS;
    const bool mixed = op.passes() > 1;
    int expert = -1;
    if (mixed) {
        const int start = tile * COLUMNS, left = op.items() - start;
        if (thread < COLUMNS) shared.items[thread] = start + thread;
        if (thread == 0) shared.count = left < COLUMNS ? left : COLUMNS;
        block_barrier();
    } else {
        if (!find_tile(shared, op, expert_id, tile, expert)) return;
        if (Op::skips_strays && expert == op.sizes.experts) return;
    }
    const int count = shared.count, tiles = (count + 7) / 8;
    float total[ROW_TILES][COLUMN_TILES][4] = {};
    if (!mixed) {
        if (thread < COLUMNS) shared.rows[thread] = thread < count ? op.source_row(shared.items[thread], 0) : -1;
        block_barrier();
        if (expert < op.sizes.experts) {
            prefill_product(shared, op, stack, source, expert, first, tiles, total);
        }
    } else {
        for (int choice = 0; choice < op.passes(); ++choice) {
            block_barrier();  // slower warps may still look through the ids of the choice before
            if (thread < COLUMNS) {
                shared.ids[thread] =
                    thread < count ? load_int(expert_id + op.id_of(shared.items[thread], choice)) : -1;
            }
            block_barrier();
            for (int leader = 0; leader < count; ++leader) {
                const int id = shared.ids[leader];
                if (id < 0 || id >= op.sizes.experts) continue;
                const bool match = thread < COLUMNS && shared.ids[thread] == id;
                // one pass for all columns of an expert; also the barrier before the rows change
                if (block_any(match && thread < leader)) continue;
                if (thread < COLUMNS) shared.rows[thread] = match ? op.source_row(shared.items[thread], choice) : -1;
                block_barrier();
                prefill_product(shared, op, stack, source, id, first, tiles, total);
                // the next pass writes over what slower warps still read
                block_barrier();
            }
        }
    }
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
        const int start = first + t * Op::TILE_OUTPUTS;
        if (start >= op.width()) break;
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int column = 8 * n + 2 * (lane % 4) + i;
                if (column < count) op.store(shared.items[column], start, lane, total[t][n][i], total[t][n][2 + i]);
            }
        }
    }
}

}  // namespace arriero
