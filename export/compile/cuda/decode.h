// Few tokens: a block takes 16 outputs of one expert and up to 8 of its tokens; its warps share out the input features.
//
// Each lane reads the 16 bytes of weights that are its own part of a tensor-core product, several groups ahead, so that
// nothing but memory bounds the speed. Weights of an expert are read once per 8 of its tokens. Tokens and scales, which
// other blocks of the multiprocessor read as well, come through its cache into registers, a group ahead.
#pragma once

#include "operators.h"

namespace arriero {

constexpr int DECODE_COLUMNS = 8;

template <class Form>
struct DecodeShared {
    static constexpr int WARPS = Form::DECODE_WARPS, THREADS = 32 * WARPS;
    static constexpr int DEPTH = 4;  // groups in flight, one of them being read: 4 KiB a warp
    Quad weights[WARPS][DEPTH][2][32];
    typename Form::Sum sums[WARPS][4][32];
    int items[DECODE_COLUMNS], count, next;
};

// sum += the product of 16 outputs of `expert` from `first` on with the columns' source rows, of this warp's groups,
// but for the scales of whole rows. SPAN steps are summed by the tensor cores; of blocks, these have one scale.
template <int SPAN, class Form, class Op>
ARRIERO_DEVICE void decode_product(DecodeShared<Form>& shared, const Op& op, const Stack<Form>& stack,
                                   const u16* source, int expert, int first, int row,
                                   typename Form::Sum (&sum)[4]) {
    using Shared = DecodeShared<Form>;
    constexpr int WARPS = Shared::WARPS, DEPTH = Shared::DEPTH, STEPS = Form::STEPS, GROUP = Stack<Form>::GROUP;
    constexpr bool BLOCKS = Form::scales == Scales::block;
    constexpr int PARTS = STEPS / SPAN;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane / 4, mine = lane % 4;
    const int groups = stack.groups();
    // Each points to what is read next, and moves on with every group of this warp's.
    const char* weights[2];
    const float* scales[2];
    for (int half = 0; half < 2; ++half) {
        const int output = op.half(first, half) + quad;
        weights[half] = stack.lane_start(expert, output, mine) + Stack<Form>::GROUP_BYTES * warp;
        if (BLOCKS) scales[half] = stack.scale_start(expert, output) + PARTS * warp;
    }
    const u16* tokens = source + static_cast<size_t>(row) * stack.inputs + GROUP * warp + 8 * mine;
    int features = stack.inputs - GROUP * warp - 8 * mine;  // from there to the row's end

    int requested = warp;
    const auto request = [&] {
        if (requested < groups) {
            const int slot = requested / WARPS % DEPTH;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                copy_weights(&shared.weights[warp][slot][half][lane], weights[half], stack.has(requested, mine));
                weights[half] += Stack<Form>::GROUP_BYTES * WARPS;
            }
        }
        requested += WARPS;
        commit_copies();
    };
    // Past a row's end what was read before stays: weights are zero there.
    Quad token[STEPS] = {};
    float scale[2][PARTS] = {};
    const auto read_token = [&](int step) {
        if (32 * step < features) token[step] = load_quad(tokens + 32 * step);
    };
    const auto read_scales = [&](int part) {
        if constexpr (BLOCKS) {
            if (32 * SPAN * part >= features + 8 * mine) return;
            for (int half = 0; half < 2; ++half) scale[half][part] = load_float(scales[half] + part);
        }
    };
    const auto next_group = [&] {
        tokens += GROUP * WARPS;
        features -= GROUP * WARPS;
        if (BLOCKS) {
            for (int half = 0; half < 2; ++half) scales[half] += PARTS * WARPS;
        }
    };

    for (int ahead = 0; ahead < DEPTH - 1; ++ahead) request();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) read_token(step);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) read_scales(part);
    for (int group = warp; group < groups; group += WARPS) {
        wait_copies<DEPTH - 2>();
        request();
        next_group();
        const int slot = group / WARPS % DEPTH;
        const Quad low = shared.weights[warp][slot][0][lane], high = shared.weights[warp][slot][1][lane];
        typename Form::Sum part[4];
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            u32 a[2][Form::WORDS], b[Form::WORDS];
            Form::weights(low, step, a[0]);
            Form::weights(high, step, a[1]);
            Form::tokens(token[step], b);
            read_token(step);
            if constexpr (Form::SPAN == 0) {
                Form::multiply(sum, a[0], a[1], b);
            } else {
                if (step % SPAN == 0) {
                    for (int i = 0; i < 4; ++i) part[i] = 0;
                }
                Form::multiply(part, a[0], a[1], b);
                if (step % SPAN != SPAN - 1) continue;
                for (int i = 0; i < 4; ++i) sum[i] += BLOCKS ? part[i] * scale[i / 2][step / SPAN] : part[i];
                read_scales(step / SPAN);
            }
        }
    }
    wait_copies<0>();
}

// The same, of any size of blocks.
template <class Form, class Op>
ARRIERO_DEVICE void decode_product_of(DecodeShared<Form>& shared, const Op& op, const Stack<Form>& stack,
                                      const u16* source, int expert, int first, int row,
                                      typename Form::Sum (&sum)[4]) {
    if constexpr (Form::scales != Scales::block) {
        decode_product<Form::STEPS>(shared, op, stack, source, expert, first, row, sum);
    } else if (stack.block == 32) {
        decode_product<1>(shared, op, stack, source, expert, first, row, sum);
    } else if (stack.block == 64) {
        decode_product<2>(shared, op, stack, source, expert, first, row, sum);
    } else {
        decode_product<4>(shared, op, stack, source, expert, first, row, sum);
    }
}

// The next up to 8 items of the expert `id` from `start` on, in order.
template <class Form, class Op>
ARRIERO_DEVICE void find_items(DecodeShared<Form>& shared, const Op& op, const int* expert_id, int id, int start) {
    if (threadIdx.x >= 32) return;
    const int lane = threadIdx.x, items = op.items();
    int found = 0, base = start;
    for (; base < items && found < DECODE_COLUMNS; base += 32) {
        const bool match = base + lane < items && load_int(expert_id + base + lane) == id;
        const u32 mask = warp_ballot(match);
        const int place = found + count_bits(mask & ((1u << lane) - 1));
        if (match && place < DECODE_COLUMNS) shared.items[place] = base + lane;
        found += count_bits(mask);
    }
    warp_barrier();
    if (lane == 0) {
        const bool full = found >= DECODE_COLUMNS;
        shared.count = full ? DECODE_COLUMNS : found;
        shared.next = full ? shared.items[DECODE_COLUMNS - 1] + 1 : items;
    }
}

// Grid: (items, width / TILE_OUTPUTS). The first item of each expert has the block that does all of them; where a
// token's experts are summed, each token has its own block, so that the sum has one order.
template <class Form, class Op>
ARRIERO_DEVICE void decode(const Op& op, const int* expert_id, const u16* source, const Stack<Form>& stack) {
    ARRIERO_SHARED(DecodeShared<Form>, shared);
    constexpr int WARPS = DecodeShared<Form>::WARPS, THREADS = DecodeShared<Form>::THREADS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, item = blockIdx.x;
    const int first = blockIdx.y * Op::TILE_OUTPUTS;
    const bool alone = op.passes() > 1;
    const int id = load_int(expert_id + op.id_of(item, 0));
    if (!alone) {
        if (Op::skips_strays && (id < 0 || id >= op.sizes.experts)) return;
        bool seen = false;
        for (int i = threadIdx.x; i < item; i += THREADS) seen |= load_int(expert_id + i) == id;
        if (block_any(seen)) return;
    }
    for (int next = item; next < op.items();) {
        if (!alone) {
            find_items(shared, op, expert_id, id, next);
        } else if (threadIdx.x == 0) {
            shared.items[0] = item;
            shared.count = 1;
            shared.next = op.items();
        }
        block_barrier();
        const int count = shared.count, column = lane / 4;
        next = shared.next;
        float total[4] = {0, 0, 0, 0};  // of the first warp
        for (int choice = 0; choice < op.passes(); ++choice) {
            const int expert = alone ? load_int(expert_id + op.id_of(item, choice)) : id;
            const bool routed = expert >= 0 && expert < op.sizes.experts;
            // columns without an item multiply the first one's token, and are never stored
            const int row = op.source_row(shared.items[column < count ? column : 0], choice);
            typename Form::Sum sum[4] = {0, 0, 0, 0};
            float scale[2] = {0, 0};  // read ahead of the product, which hides how long that takes
            if (routed) {
                for (int half = 0; half < 2; ++half) scale[half] = stack.scale(expert, op.half(first, half) + lane / 4);
                decode_product_of(shared, op, stack, source, expert, first, row, sum);
            }
            // the first warp may still read the sums of the choice before
            if (choice > 0) block_barrier();
            for (int i = 0; i < 4; ++i) shared.sums[warp][i][lane] = sum[i];
            block_barrier();
            if (warp == 0 && routed) {
                for (int i = 0; i < 4; ++i) {
                    typename Form::Sum whole = 0;
                    for (int w = 0; w < WARPS; ++w) whole += shared.sums[w][i][lane];
                    total[i] += static_cast<float>(whole) * scale[i / 2];
                }
            }
        }
        if (warp == 0) {
            for (int i = 0; i < 2; ++i) {
                const int mine = 2 * (lane % 4) + i;
                if (mine < count) op.store(shared.items[mine], first, lane, total[i], total[2 + i]);
            }
        }
    }
}

}  // namespace arriero
