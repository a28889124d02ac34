// Few tokens: a block takes 16 outputs of one expert and up to 8 of its tokens; its warps share out the input features.
//
// Each lane reads the 16 bytes of weights and of tokens that are its own part of a tensor-core product, several groups
// ahead, so that nothing but memory bounds the speed. Weights of an expert are read once per 8 of its tokens.
#pragma once

#include "operators.h"

namespace arriero {

constexpr int DECODE_COLUMNS = 8;

template <class Form>
struct DecodeShared {
    // groups in flight: about 9 KiB a warp
    static constexpr int DEPTH = Form::STEPS == 1 ? 6 : Form::STEPS == 2 ? 4 : 3;
    Quad weights[WARPS][DEPTH][2][32];
    Quad tokens[WARPS][DEPTH][Form::STEPS][32];
    float scales[Form::scales == Scales::block ? WARPS : 1][DEPTH][2][8][Form::STEPS];
    float sums[WARPS][4][32];
    int items[DECODE_COLUMNS], count, next;
};

// sum += the product of 16 outputs of `expert` from `first` on with the columns' source rows, of this warp's groups.
template <class Act, class Form, class Op>
ARRIERO_DEVICE void decode_product(DecodeShared<Form>& shared, const Op& op, const Stack<Form>& stack,
                                   const u16* source, int expert, int first, int row, float (&sum)[4]) {
    constexpr int DEPTH = DecodeShared<Form>::DEPTH, STEPS = Form::STEPS, GROUP = Stack<Form>::GROUP;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane / 4, mine = lane % 4;
    const int groups = stack.groups();
    const char* weights[2];
    const float* scales[2];
    for (int half = 0; half < 2; ++half) {
        const int output = op.half(first, half) + quad;
        weights[half] = stack.row_start(expert, output) + 16 * mine;
        if (Form::scales != Scales::none) scales[half] = stack.scale_start(expert, output);
    }
    const u16* tokens = source + static_cast<size_t>(row < 0 ? 0 : row) * stack.inputs;

    const auto request = [&](int group) {
        if (group < groups) {
            const int slot = group / WARPS % DEPTH;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                copy_weights(&shared.weights[warp][slot][half][lane], weights[half] + 64 * static_cast<size_t>(group),
                             stack.has(group, mine));
                if (Form::scales == Scales::block && mine < STEPS) {
                    const int feature = group * GROUP + 32 * mine;
                    const bool valid = feature < stack.inputs;
                    copy_scale(&shared.scales[warp][slot][half][quad][mine],
                               scales[half] + (valid ? feature / stack.block : 0), valid);
                }
            }
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                const int feature = group * GROUP + 32 * step + 8 * mine;
                const bool valid = row >= 0 && feature < stack.inputs;
                copy_tokens(&shared.tokens[warp][slot][step][lane], tokens + (valid ? feature : 0), valid);
            }
        }
        commit_copies();
    };

    float channel[4] = {0, 0, 0, 0};
    for (int ahead = 0; ahead < DEPTH - 1; ++ahead) request(warp + ahead * WARPS);
    for (int group = warp; group < groups; group += WARPS) {
        wait_copies<DEPTH - 2>();
        // a scale is copied by one lane and read by four
        if (Form::scales == Scales::block) warp_barrier();
        request(group + (DEPTH - 1) * WARPS);
        const int slot = group / WARPS % DEPTH;
        const Quad low = shared.weights[warp][slot][0][lane], high = shared.weights[warp][slot][1][lane];
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            u32 a[4], b[4];
            Form::widen(low, step, a);
            Form::widen(high, step, b);
            const Quad x = shared.tokens[warp][slot][step][lane];
            float part[4] = {0, 0, 0, 0};
            float(&to)[4] = Form::scales == Scales::block ? part : Form::scales == Scales::channel ? channel : sum;
            Act::multiply_tile(to, a[0], b[0], a[1], b[1], x.word[0], x.word[1]);
            Act::multiply_tile(to, a[2], b[2], a[3], b[3], x.word[2], x.word[3]);
            if (Form::scales == Scales::block) {
                for (int i = 0; i < 4; ++i) sum[i] += part[i] * shared.scales[warp][slot][i / 2][quad][step];
            }
        }
    }
    wait_copies<0>();
    if (Form::scales == Scales::channel) {
        for (int i = 0; i < 4; ++i) sum[i] += channel[i] * load_float(scales[i / 2]);
    }
    // the next product's copies must not overtake this one's reads of scales
    if (Form::scales == Scales::block) warp_barrier();
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
template <class Act, class Form, class Op>
ARRIERO_DEVICE void decode(const Op& op, const int* expert_id, const u16* source, const Stack<Form>& stack) {
    ARRIERO_SHARED(DecodeShared<Form>, shared);
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
        float sum[4] = {0, 0, 0, 0};
        for (int choice = 0; choice < op.passes(); ++choice) {
            const int expert = alone ? load_int(expert_id + op.id_of(item, choice)) : id;
            if (expert < 0 || expert >= op.sizes.experts) continue;
            const int row = column < count ? op.source_row(shared.items[column], choice) : -1;
            decode_product<Act>(shared, op, stack, source, expert, first, row, sum);
        }
        for (int i = 0; i < 4; ++i) shared.sums[warp][i][lane] = sum[i];
        block_barrier();
        if (warp == 0) {
            float total[4] = {0, 0, 0, 0};
            for (int w = 0; w < WARPS; ++w) {
                for (int i = 0; i < 4; ++i) total[i] += shared.sums[w][i][lane];
            }
            for (int i = 0; i < 2; ++i) {
                const int mine = 2 * (lane % 4) + i;
                if (mine < count) op.store(shared.items[mine], first, lane, total[i], total[2 + i]);
            }
        }
    }
}

}  // namespace arriero
