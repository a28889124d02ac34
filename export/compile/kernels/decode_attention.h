// Attention of one token per row: a row's keys are cut into spans, and each span is read once, by one thread, for all
// query heads of its key head. Spans lie where they lie whatever runs beside them, so a row's sums have one order.
#pragma once

#include "code_attention.h"
#include "row_weights.h"

namespace ARRIERO_LEVEL {

constexpr int SCORE_ROWS = 5;  // that meet a few keys together: with the keys their sums fill the registers

// Asks for a row that will be read when KEYS others are done.
template <class T>
inline void fetch_row(const T* row, int64_t D) {
    const auto* bytes = reinterpret_cast<const char*>(row);
    for (int64_t i = 0; i < D * static_cast<int64_t>(sizeof(T)); i += 64) fetch(bytes + i);
}

// Scores of `count` keys for `rows` rows: KEYS at a time, which stay in the nearest cache for all rows; what is read
// next, `values` in the end, is asked for. tile(Constant<M>, Constant<N>, i, j) gives those of rows i .. i + M and keys
// j .. j + N.
template <class T, class Tile>
inline void score_keys(int64_t rows, const T* keys, const T* values, int64_t count, int64_t D, const Tile& tile) {
    constexpr int64_t KEYS = AttentionWorkspace::KEYS;
    for (int64_t first = 0; first < count; first += KEYS) {
        const int64_t end = smaller(first + KEYS, count);
        for (int64_t i = 0; i < rows;) {
            i += with_rows<SCORE_ROWS>(rows - i, [&](auto tall) {
                constexpr int M = decltype(tall)::value, N = 5 * M < REGISTERS ? 4 : 2;
                for (int64_t j = first; j < end;) {
                    j += with_rows_or_one<N>(end - j, [&](auto wide) {
                        for (int64_t n = j; i == 0 && n < j + decltype(wide)::value; ++n) {
                            const int64_t next = n + KEYS;
                            fetch_row(next < count ? keys + next * D : values + (next - count) * D, D);
                        }
                        tile(tall, wide, i, j);
                    });
                }
            });
        }
    }
}

// Sums of `count` values for `rows` rows: KEYS at a time, which stay in the nearest cache for all columns.
// tile(Constant<M>, Constant<V>, i, j, some, d) adds rows i .. i + M, values j .. j + some, columns from d on.
template <class Tile>
inline void sum_values(int64_t rows, int64_t count, int64_t D, const Tile& tile) {
    for (int64_t j = 0; j < count; j += AttentionWorkspace::KEYS) {
        const int64_t some = smaller(AttentionWorkspace::KEYS, count - j);
        for (int64_t i = 0; i < rows;) {
            i += with_rows<FLOAT_ROWS>(rows - i, [&](auto tall) {
                int64_t d = 0;
                for (; d + TILE_COLUMNS <= D; d += TILE_COLUMNS) tile(tall, Constant<FLOAT_VECTORS>{}, i, j, some, d);
                for (; d < D; d += LANES) tile(tall, Constant<1>{}, i, j, some, d);
            });
        }
    }
}

// out[m][0 .. V * LANES) += weights[m][0 .. count) values; values are [count, D].
template <int FORMAT, int M, int V, class T>
TILE void value_tile(const float* const* weights, const T* values, int64_t count, int64_t D, float* const* out) {
    constexpr int LINES = (V * LANES * static_cast<int>(sizeof(T)) + 63) / 64;
    Float sums[M][V];
    UNROLL for (int m = 0; m < M; ++m) { UNROLL for (int v = 0; v < V; ++v) sums[m][v] = load(out[m] + v * LANES); }
    for (int64_t j = 0; j < count; ++j, values += D) {
        const auto* ahead = reinterpret_cast<const char*>(values + AttentionWorkspace::KEYS * D);
        UNROLL for (int n = 0; n < LINES; ++n) fetch(ahead + n * 64);
        Float row[V];
        UNROLL for (int v = 0; v < V; ++v) row[v] = Stored<FORMAT>::widen(values + v * LANES);
        UNROLL for (int m = 0; m < M; ++m) {
            const Float weight = all(weights[m][j]);
            UNROLL for (int v = 0; v < V; ++v) sums[m][v] = fma(weight, row[v], sums[m][v]);
        }
    }
    UNROLL for (int m = 0; m < M; ++m) { UNROLL for (int v = 0; v < V; ++v) store(out[m] + v * LANES, sums[m][v]); }
}

// Turns `count` scores into weights relative to the largest of them, which it gives; `total` is their sum.
inline float softmax(float* scores, int64_t count, float& total) {
    const int64_t padded = round_up(count, LANES);
    Float above = all(-__builtin_inff()), added = all(0.0f);
    for (int64_t j = count; j < padded; ++j) scores[j] = -__builtin_inff();
    for (int64_t j = 0; j < padded; j += LANES) above = at_least(above, load(scores + j));
    const float most = most_of(above);
    for (int64_t j = 0; j < padded; j += LANES) store(scores + j, exponential(sub(load(scores + j), all(most))));
    for (int64_t j = count; j < padded; ++j) scores[j] = 0.0f;
    for (int64_t j = 0; j < padded; j += LANES) added = add(added, load(scores + j));
    total = sum(added);
    return most;
}

// What the first `rows` of `space.asked` make of one span: space.sums, and of each its largest score and its total.
template <int FORMAT, class T>
inline void attend_span(int64_t rows, const T* keys, const T* values, int64_t count, int64_t D,
                        const DecodeWorkspace& space, float* most, float* total) {
    constexpr int64_t SPAN = AttentionWorkspace::SPAN;
    score_keys(rows, keys, values, count, D, [&](auto tall, auto wide, int64_t i, int64_t j) {
        constexpr int M = decltype(tall)::value, N = decltype(wide)::value;
        const float* asked[M];
        float scores[M][N];
        for (int m = 0; m < M; ++m) asked[m] = space.asked + (i + m) * D;
        dot_tile<FORMAT, M, N>(asked, keys + j * D, D, scores);
        for (int m = 0; m < M; ++m) __builtin_memcpy(space.scores + (i + m) * SPAN + j, scores[m], sizeof scores[m]);
    });
    for (int64_t i = 0; i < rows; ++i) most[i] = softmax(space.scores + i * SPAN, count, total[i]);
    __builtin_memset(space.sums, 0, rows * D * sizeof(float));
    sum_values(rows, count, D, [&](auto tall, auto wide, int64_t i, int64_t j, int64_t some, int64_t d) {
        constexpr int M = decltype(tall)::value;
        const float* weights[M];
        float* to[M];
        for (int m = 0; m < M; ++m) {
            weights[m] = space.scores + (i + m) * SPAN + j;
            to[m] = space.sums + (i + m) * D + d;
        }
        value_tile<FORMAT, M, decltype(wide)::value>(weights, values + j * D + d, some, D, to);
    });
}

// The same of a cache of codes.
inline void attend_codes(int64_t rows, const int8_t* keys, const int8_t* values, int64_t count, int64_t D,
                         const DecodeWorkspace& space, float* most, float* total) {
    constexpr int64_t SPAN = AttentionWorkspace::SPAN, KEYS = AttentionWorkspace::KEYS;
    const int64_t padded = round_up(D, 2 * LANES);
    float steps[AttentionWorkspace::TOGETHER], factors[AttentionWorkspace::TOGETHER][SPAN / KEYS];
    auto* scores = reinterpret_cast<int32_t*>(space.scores);
    for (int64_t i = 0; i < rows; ++i) {
        steps[i] = round_to_words(space.asked + i * D, D, padded, space.words + i * padded);
    }
    score_keys(rows, keys, values, count, D, [&](auto tall, auto wide, int64_t i, int64_t j) {
        constexpr int M = decltype(tall)::value, N = decltype(wide)::value;
        const int16_t* asked[M];
        int32_t dots[M][N];
        for (int m = 0; m < M; ++m) asked[m] = space.words + (i + m) * padded;
        code_dot_tile<M, N>(asked, keys + j * D, D, dots);
        for (int m = 0; m < M; ++m) __builtin_memcpy(scores + (i + m) * SPAN + j, dots[m], sizeof dots[m]);
    });
    for (int64_t i = 0; i < rows; ++i) {
        most[i] = softmax_codes(scores + i * SPAN, steps[i], count, space.scaled, space.weights + i * SPAN, factors[i],
                                total[i]);
    }
    __builtin_memset(space.sums, 0, rows * D * sizeof(float));
    sum_values(rows, count, D, [&](auto tall, auto wide, int64_t i, int64_t j, int64_t some, int64_t d) {
        constexpr int M = decltype(tall)::value;
        const int16_t* weights[M];
        float worth[M];
        float* to[M];
        for (int m = 0; m < M; ++m) {
            weights[m] = space.weights + (i + m) * SPAN + j;
            worth[m] = factors[i + m][j / KEYS];
            to[m] = space.sums + (i + m) * D + d;
        }
        code_value_tile<M, decltype(wide)::value>(weights, worth, values + j * D + d, some, D, to);
    });
}

inline int64_t spans_of(int64_t position, int64_t chunk) {
    return slot_of(position, chunk) / AttentionWorkspace::SPAN + 1;
}

// Row b's one token, whose query and output are `q` and `out` [Q,D]: the units [unit, unit + step, ..) of G * spans.
template <int FORMAT>
inline void attend_spans(const float* q, int64_t position, const Cache& cache, float* out, int64_t b, int64_t Q,
                         int64_t G, int64_t C, int64_t D, int64_t chunk, const DecodeWorkspace& space, int64_t unit,
                         int64_t step) {
    using T = typename Stored<FORMAT>::Type;
    constexpr int64_t SPAN = AttentionWorkspace::SPAN, TOGETHER = AttentionWorkspace::TOGETHER;
    const int64_t heads = Q / G, held = slot_of(position, chunk) + 1, spans = spans_of(position, chunk);
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(D));
    for (; unit < G * spans; unit += step) {
        const int64_t g = unit / spans, span = unit % spans, count = smaller(SPAN, held - span * SPAN);
        const int64_t at = ((b * G + g) * C + span * SPAN) * D;
        const T *keys = static_cast<const T*>(cache.keys) + at, *values = static_cast<const T*>(cache.values) + at;
        for (int64_t first = 0; first < heads; first += TOGETHER) {
            const int64_t rows = smaller(TOGETHER, heads - first), head = g * heads + first;
            float most[TOGETHER], total[TOGETHER];
            for (int64_t i = 0; i < rows; ++i) {
                scale_row_to(q + (head + i) * D, scale, cache.steps_of_keys(g, D), D, space.asked + i * D);
            }
            if constexpr (FORMAT == ARRIERO_CODES) {
                attend_codes(rows, keys, values, count, D, space, most, total);
            } else {
                attend_span<FORMAT>(rows, keys, values, count, D, space, most, total);
            }
            for (int64_t i = 0; i < rows; ++i) {
                const float* sums = space.sums + i * D;
                if (spans == 1) {
                    scale_row_to(sums, 1.0f / total[i], cache.steps_of_values(g, D), D, out + (head + i) * D);
                    continue;
                }
                const int64_t outcome = (b * Q + head + i) * space.spans + span;
                space.highest[outcome] = most[i], space.total[outcome] = total[i];
                __builtin_memcpy(space.outcomes + outcome * D, sums, D * sizeof(float));
            }
        }
    }
}

inline int32_t attention_merge(const int64_t* positions, const int64_t* starts, const float* value_steps, float* out,
                               int64_t B, int64_t Q, int64_t G, int64_t C, int64_t D, int64_t chunk, void* workspace,
                               int64_t part, int64_t parts) {
    const DecodeWorkspace space(workspace, part, B, Q, C, D, parts);
    for (int64_t row = part; row < B * Q; row += parts) {
        const int64_t b = row / Q, t = starts[b];
        if (starts[b + 1] - t != 1) continue;
        const int64_t spans = spans_of(positions[t], chunk), at = row * space.spans;
        if (spans == 1) continue;
        float highest = space.highest[at], total = 0.0f;
        for (int64_t span = 1; span < spans; ++span) {
            if (space.highest[at + span] > highest) highest = space.highest[at + span];
        }
        __builtin_memset(space.sums, 0, D * sizeof(float));
        for (int64_t span = 0; span < spans; ++span) {
            const Float factor = exponential(all(space.highest[at + span] - highest));
            float one[LANES];
            store(one, factor);
            total += space.total[at + span] * one[0];
            for (int64_t d = 0; d < D; d += LANES) {
                const Float outcome = load(space.outcomes + (at + span) * D + d);
                store(space.sums + d, fma(outcome, factor, load(space.sums + d)));
            }
        }
        const float* steps = value_steps ? value_steps + row % Q / (Q / G) * D : nullptr;
        scale_row_to(space.sums, 1.0f / total, steps, D, out + (t * Q + row % Q) * D);
    }
    return 0;
}

}  // namespace ARRIERO_LEVEL
