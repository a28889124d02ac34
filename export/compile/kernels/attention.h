// Causal grouped-query attention over the slots of a cache, as arriero_kernels.h tells it. Of prompts blocks of queries
// meet blocks of keys with a running softmax (Milakov and Gimelshein 2018), so that no score matrix is kept.
#pragma once

#include "decode_attention.h"

namespace ARRIERO_LEVEL {

// scores[m][j] = q[m] . keys[j], with `stride` from one q to the next: keys are widened and transposed once, into `piece`.
// Scores from `count` on are zero.
template <int FORMAT, class T>
inline void score_block(const float* q, int64_t stride, int64_t rows, const T* keys, int64_t count, int64_t D,
                        float* scores, float* piece) {
    for (int64_t j = 0; j < count; j += TILE_COLUMNS) {
        unpack_rows<FORMAT>(keys + j * D, D, smaller<int64_t>(TILE_COLUMNS, count - j), D, piece);
        for (int64_t i = 0; i < rows;) {
            i += with_rows<FLOAT_ROWS>(rows - i, [&](auto tall) {
                constexpr int M = decltype(tall)::value;
                const float* a[M];
                float* to[M];
                for (int m = 0; m < M; ++m) {
                    a[m] = q + (i + m) * stride;
                    to[m] = scores + (i + m) * AttentionWorkspace::KEYS + j;
                }
                float_tile<M>(a, piece, TILE_COLUMNS, D, to, false);
            });
        }
    }
}

// sums[m] += weights[m][0 .. count) values, for all rows.
inline void add_values(const float* weights, int64_t rows, const float* values, int64_t count, int64_t D, float* sums) {
    for (int64_t i = 0; i < rows;) {
        i += with_rows<FLOAT_ROWS>(rows - i, [&](auto tall) {
            constexpr int M = decltype(tall)::value;
            const float* a[M];
            float* to[M];
            for (int m = 0; m < M; ++m) a[m] = weights + (i + m) * AttentionWorkspace::KEYS;
            int64_t d = 0;
            for (; d + TILE_COLUMNS <= D; d += TILE_COLUMNS) {
                for (int m = 0; m < M; ++m) to[m] = sums + (i + m) * D + d;
                float_tile<M>(a, values + d, D, count, to, true);
            }
            for (; d < D; d += LANES) {
                for (int m = 0; m < M; ++m) to[m] = sums + (i + m) * D + d;
                float_tile<M, 1>(a, values + d, D, count, to, true);
            }
        });
    }
}

inline void scale_in_place(float* row, float factor, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(row + i, mul(load(row + i), all(factor)));
}

// Turns one row's scores of KEYS keys, of which it sees the first `seen`, into weights relative to its largest score so
// far, and brings what was summed before to the same measure.
inline void online_softmax_update(float* scores, int64_t seen, float& most, float& total, float* sums, int64_t D) {
    constexpr int64_t KEYS = AttentionWorkspace::KEYS;
    Float above = all(most), added = all(0.0f);
    for (int64_t j = seen; j < KEYS; ++j) scores[j] = -__builtin_inff();
    for (int64_t j = 0; j < KEYS; j += LANES) {
        above = at_least(above, load(scores + j));
    }
    const float now = most_of(above);
    for (int64_t j = 0; j < KEYS; j += LANES) store(scores + j, exponential(sub(load(scores + j), all(now))));
    for (int64_t j = seen; j < KEYS; ++j) scores[j] = 0.0f;
    for (int64_t j = 0; j < KEYS; j += LANES) added = add(added, load(scores + j));
    float kept[LANES];
    store(kept, exponential(all(most - now)));
    total = total * kept[0] + sum(added);
    if (now != most) scale_in_place(sums, kept[0], D);
    most = now;
}

// Leaves in space.sums and space.total what `rows` queries of space.asked, `wide` apart, make of the first `held` keys and
// values, of which row i sees the first seen(i): `wide` is D, or what LANES make of it.
template <int FORMAT, class T, class Seen>
inline void attend_keys(int64_t rows, const T* keys, const T* values, int64_t held, int64_t D, int64_t wide,
                        const PromptWorkspace& space, const Seen& seen) {
    constexpr int64_t KEYS = AttentionWorkspace::KEYS;
    for (int64_t i = 0; i < rows; ++i) {
        space.most[i] = -__builtin_inff();
        space.total[i] = 0.0f;
    }
    __builtin_memset(space.sums, 0, rows * wide * sizeof(float));
    for (int64_t key = 0; key < held; key += KEYS) {
        const int64_t some = smaller(KEYS, held - key);
        score_block<FORMAT>(space.asked, wide, rows, keys + key * D, some, D, space.scores, space.piece);
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t here = smaller(some, seen(i) - key);
            online_softmax_update(space.scores + i * KEYS, here > 0 ? here : 0, space.most[i], space.total[i],
                                  space.sums + i * wide, wide);
        }
        const float* widened = space.values;
        if constexpr (FORMAT == ARRIERO_F32) {
            if (wide == D) widened = values + key * D;
        }
        for (int64_t j = 0; widened == space.values && j < some; ++j) {
            widen_row<FORMAT>(values + (key + j) * D, D, space.values + j * wide);
        }
        add_values(space.scores, rows, widened, some, wide, space.sums);
    }
}

// Row b's `count` tokens, whose first one's query and output are `q` and `out` [Q,D]: the units [unit, unit + step, ..)
// of G times its blocks of queries.
template <int FORMAT>
inline void attend_blocks(const float* q, int64_t position, int64_t count, const Cache& cache, float* out, int64_t b,
                          int64_t Q, int64_t G, int64_t C, int64_t D, int64_t chunk, const PromptWorkspace& space,
                          int64_t unit, int64_t step) {
    using T = typename Stored<FORMAT>::Type;
    const int64_t heads = Q / G, blocks = (count + space.queries - 1) / space.queries;
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(D));
    for (; unit < G * blocks; unit += step) {
        const int64_t g = unit / blocks, first = unit % blocks * space.queries;
        const int64_t queries = smaller(space.queries, count - first), rows = queries * heads;
        const int64_t slot = slot_of(position, chunk) + first, held = slot + queries;
        const T* keys = static_cast<const T*>(cache.keys) + (b * G + g) * C * D;
        const T* values = static_cast<const T*>(cache.values) + (b * G + g) * C * D;
        // rows are in the order of (query, head)
        const auto at = [&](int64_t i) { return ((first + i / heads) * Q + g * heads + i % heads) * D; };
        for (int64_t i = 0; i < rows; ++i) {
            scale_row_to(q + at(i), scale, cache.steps_of_keys(g, D), D, space.asked + i * D);
        }
        attend_keys<FORMAT>(rows, keys, values, held, D, D, space, [&](int64_t i) { return slot + i / heads + 1; });
        for (int64_t i = 0; i < rows; ++i) {
            scale_row_to(space.sums + i * D, 1.0f / space.total[i], cache.steps_of_values(g, D), D, out + at(i));
        }
    }
}

inline int32_t attention(int64_t format, const float* q, const int64_t* positions, const int64_t* starts,
                         const void* key_cache, const void* value_cache, const float* key_steps,
                         const float* value_steps, float* out, int64_t B, int64_t T, int64_t Q, int64_t G, int64_t C,
                         int64_t D, int64_t chunk, void* workspace, int64_t part, int64_t parts) {
    if (T == 0) return 0;
    const Cache cache{key_cache, value_cache, key_steps, value_steps};
    const DecodeWorkspace decode(workspace, part, B, Q, C, D, parts);
    const PromptWorkspace prompt(static_cast<uint8_t*>(workspace) + prompts_at(B, Q, C, D, parts), part, T, Q, G, D);
    with_cache_format(format, [&](auto stored) {
        constexpr int FORMAT = decltype(stored)::value;
        // all rows' units in turns, because later queries see more keys; `ahead` is the next one that is this part's
        int64_t ahead = part;
        for (int64_t b = 0; b < B; ++b) {
            const int64_t t = starts[b], count = starts[b + 1] - t;
            const float* asked = q + t * Q * D;
            float* to = out + t * Q * D;
            int64_t units = 0;
            // by the row's tokens, not by those of a block: a prompt's pieces would change its bits
            if (count == 1) {
                units = G * spans_of(positions[t], chunk);
                attend_spans<FORMAT>(asked, positions[t], cache, to, b, Q, G, C, D, chunk, decode, ahead, parts);
            } else if (count > 1) {
                units = G * ((count + prompt.queries - 1) / prompt.queries);
                attend_blocks<FORMAT>(asked, positions[t], count, cache, to, b, Q, G, C, D, chunk, prompt, ahead,
                                      parts);
            }
            while (ahead < units) ahead += parts;
            ahead -= units;
        }
    });
    return 0;
}

}  // namespace ARRIERO_LEVEL
