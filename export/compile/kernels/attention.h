// Causal grouped-query attention over the slots of a cache, as arriero_kernels.h tells it: blocks of queries meet
// blocks of keys with a running softmax (Milakov and Gimelshein 2018), so that no score matrix is kept.
#pragma once

#include "exponential.h"
#include "row_weights.h"
#include "workspace.h"

namespace ARRIERO_LEVEL {

inline int64_t slot_of(int64_t position, int64_t chunk) { return chunk ? position % chunk : position; }

inline int32_t cache_write(const float* k, const float* v, const int64_t* positions, float* key_cache,
                           float* value_cache, int64_t B, int64_t S, int64_t G, int64_t C, int64_t D, int64_t chunk,
                           int64_t part, int64_t parts) {
    const Range rows = share(B * S, 1, part, parts);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const int64_t slot = slot_of(positions[row], chunk);
        for (int64_t g = 0; g < G; ++g) {
            const int64_t to = ((row / S * G + g) * C + slot) * D, from = (row * G + g) * D;
            __builtin_memcpy(key_cache + to, k + from, D * sizeof(float));
            __builtin_memcpy(value_cache + to, v + from, D * sizeof(float));
        }
    }
    return 0;
}

// Asks for `count` floats that will be needed soon: key and value blocks take turns, which no hardware foresees.
inline void fetch_rows(const float* p, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(p + i, 0, 2);
}

// scores[m][j] = q[m] . keys[j] for a few rows: keys are read as they lie.
inline void score_few(const Rows<const float>& q, int64_t rows, const float* keys, int64_t count, int64_t D,
                      float* scores) {
    for (int64_t i = 0; i < rows;) {
        i += with_rows<8>(rows - i, [&](auto tall) {
            constexpr int M = decltype(tall)::value;
            constexpr int N = 5 * M < REGISTERS ? 4 : 3 * M < REGISTERS ? 2 : 1;
            const float* a[M];
            for (int m = 0; m < M; ++m) a[m] = q[i + m];
            for (int64_t j = 0; j < count;) {
                fetch_rows(keys + (AttentionWorkspace::KEYS + j) * D, i == 0 ? N * D : 0);
                j += with_rows_or_one<N>(count - j, [&](auto wide) {
                    float tile[M][decltype(wide)::value];
                    dot_tile<ARRIERO_F32, M, decltype(wide)::value>(a, keys + j * D, D, tile);
                    for (int m = 0; m < M; ++m) {
                        __builtin_memcpy(scores + (i + m) * AttentionWorkspace::KEYS + j, tile[m], sizeof tile[m]);
                    }
                });
            }
        });
    }
}

// The same for many rows: keys are transposed once, into `piece`. Scores from `count` on are zero.
inline void score_many(const Rows<const float>& q, int64_t rows, const float* keys, int64_t count, int64_t D,
                       float* scores, float* piece) {
    for (int64_t j = 0; j < count; j += TILE_COLUMNS) {
        unpack_rows<ARRIERO_F32>(keys + j * D, D, smaller<int64_t>(TILE_COLUMNS, count - j), D, piece);
        for (int64_t i = 0; i < rows;) {
            i += with_rows<FLOAT_ROWS>(rows - i, [&](auto tall) {
                constexpr int M = decltype(tall)::value;
                const float* a[M];
                float* to[M];
                for (int m = 0; m < M; ++m) a[m] = q[i + m], to[m] = scores + (i + m) * AttentionWorkspace::KEYS + j;
                float_tile<M>(a, piece, TILE_COLUMNS, D, to, false);
            });
        }
    }
}

// sums[m] += weights[m][0 .. count) values, for all rows.
inline void add_values(const float* weights, int64_t rows, const float* values, int64_t count, int64_t D, float* sums) {
    for (int64_t i = 0; i < rows;) {
        fetch_rows(values + AttentionWorkspace::KEYS * D, i == 0 ? count * D : 0);
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
inline void online_softmax_update(float* scores, int64_t seen, float scale, float& most, float& total, float* sums, int64_t D) {
    constexpr int64_t KEYS = AttentionWorkspace::KEYS;
    Float above = all(most), added = all(0.0f);
    for (int64_t j = seen; j < KEYS; ++j) scores[j] = -__builtin_inff();
    for (int64_t j = 0; j < KEYS; j += LANES) {
        const Float scaled = mul(load(scores + j), all(scale));
        above = at_least(above, scaled);
        store(scores + j, scaled);
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

inline int32_t attention(const float* q, const int64_t* positions, const float* key_cache, const float* value_cache,
                         float* out, int64_t B, int64_t S, int64_t Q, int64_t G, int64_t C, int64_t D, int64_t chunk,
                         void* workspace, int64_t part, int64_t parts) {
    const AttentionWorkspace space(workspace, part, S, Q, G, D);
    const int64_t heads = Q / G, blocks = S ? (S + space.queries - 1) / space.queries : 0;
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(D));
    // in turns, because later queries see more keys
    for (int64_t unit = part; unit < B * G * blocks; unit += parts) {
        const int64_t b = unit / (G * blocks), g = unit / blocks % G, first = unit % blocks * space.queries;
        const int64_t queries = smaller(space.queries, S - first), rows = queries * heads;
        const int64_t slot = slot_of(positions[b * S + first], chunk);
        const float* keys = key_cache + (b * G + g) * C * D;
        const float* values = value_cache + (b * G + g) * C * D;
        const int64_t held = slot + queries;
        // rows are in the order of (query, head)
        const Rows<const float> asked{q, 1, space.offsets};
        for (int64_t i = 0; i < rows; ++i) {
            space.offsets[i] = ((b * S + first + i / heads) * Q + g * heads + i % heads) * D;
            space.most[i] = -__builtin_inff();
            space.total[i] = 0.0f;
        }
        __builtin_memset(space.sums, 0, rows * D * sizeof(float));
        for (int64_t key = 0; key < held; key += AttentionWorkspace::KEYS) {
            const int64_t count = smaller(AttentionWorkspace::KEYS, held - key);
            if (S == 1 && rows <= 8) {  // not by the rows of a block: a prompt's pieces would change its bits
                score_few(asked, rows, keys + key * D, count, D, space.scores);
            } else {
                score_many(asked, rows, keys + key * D, count, D, space.scores, space.piece);
            }
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t seen = smaller(count, slot + i / heads + 1 - key);
                online_softmax_update(space.scores + i * AttentionWorkspace::KEYS, seen > 0 ? seen : 0, scale, space.most[i],
                       space.total[i], space.sums + i * D, D);
            }
            add_values(space.scores, rows, values + key * D, count, D, space.sums);
        }
        for (int64_t i = 0; i < rows; ++i) {
            scale_in_place(space.sums + i * D, 1.0f / space.total[i], D);
            __builtin_memcpy(out + space.offsets[i], space.sums + i * D, D * sizeof(float));
        }
    }
    return 0;
}

}  // namespace ARRIERO_LEVEL
