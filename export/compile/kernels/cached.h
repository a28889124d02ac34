// A cache of keys and values: where a token lies in it, and how new ones are stored.
#pragma once

#include "widen.h"

namespace ARRIERO_LEVEL {

inline int64_t slot_of(int64_t position, int64_t chunk) { return chunk ? position % chunk : position; }

// A layer's cache, [B,G,C,D] each. Steps of int8 codes are [G,D]; they are null in other formats.
struct Cache {
    const void *keys, *values;
    const float *key_steps, *value_steps;

    const float* steps_of_keys(int64_t g, int64_t D) const { return key_steps ? key_steps + g * D : nullptr; }
    const float* steps_of_values(int64_t g, int64_t D) const { return value_steps ? value_steps + g * D : nullptr; }
};

// Calls `function` with the Constant of a cache's format.
template <class Function>
inline void with_cache_format(int64_t format, Function function) {
    switch (format) {
        case ARRIERO_F16: return function(Constant<ARRIERO_F16>{});
        case ARRIERO_CODES: return function(Constant<ARRIERO_CODES>{});
        default: return function(Constant<ARRIERO_F32>{});
    }
}

// Stores `count` numbers; `steps` are those of int8 codes.
template <int FORMAT>
inline void store_row(const float* from, const float* steps, int64_t count, typename Stored<FORMAT>::Type* to) {
    if constexpr (FORMAT == ARRIERO_F32) {
        __builtin_memcpy(to, from, count * sizeof(float));
    } else {
        for (int64_t i = 0; i < count; i += LANES) {
            if constexpr (FORMAT == ARRIERO_F16) {
                store_f16(to + i, load(from + i));
            } else {
                const Float code = div(load(from + i), load(steps + i));
                store_bytes(to + i, nearest(at_most(all(127.0f), at_least(all(-128.0f), code))));
            }
        }
    }
}

template <int FORMAT>
inline void write_tokens(const float* x, const int64_t* positions, const int64_t* starts, const float* steps,
                         void* cache, int64_t B, int64_t G, int64_t C, int64_t D, int64_t chunk, Range tokens) {
    auto* stored = static_cast<typename Stored<FORMAT>::Type*>(cache);
    for (int64_t b = 0; b < B; ++b) {
        const int64_t end = smaller(starts[b + 1], tokens.end);
        for (int64_t t = starts[b] > tokens.begin ? starts[b] : tokens.begin; t < end; ++t) {
            const int64_t slot = slot_of(positions[t], chunk);
            for (int64_t g = 0; g < G; ++g) {
                const float* own = steps ? steps + g * D : nullptr;
                store_row<FORMAT>(x + (t * G + g) * D, own, D, stored + ((b * G + g) * C + slot) * D);
            }
        }
    }
}

inline int32_t cache_write(int64_t format, const float* k, const float* v, const int64_t* positions,
                           const int64_t* starts, const float* key_steps, const float* value_steps, void* key_cache,
                           void* value_cache, int64_t B, int64_t G, int64_t C, int64_t D, int64_t chunk, int64_t part,
                           int64_t parts) {
    const Range tokens = share(starts[B], 1, part, parts);
    with_cache_format(format, [&](auto stored) {
        constexpr int FORMAT = decltype(stored)::value;
        write_tokens<FORMAT>(k, positions, starts, key_steps, key_cache, B, G, C, D, chunk, tokens);
        write_tokens<FORMAT>(v, positions, starts, value_steps, value_cache, B, G, C, D, chunk, tokens);
    });
    return 0;
}

// to = from * factor, and where there are `steps` times those: codes are then multiplied as they are.
inline void scale_row_to(const float* from, float factor, const float* steps, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += LANES) {
        const Float scaled = mul(load(from + i), all(factor));
        store(to + i, steps ? mul(scaled, load(steps + i)) : scaled);
    }
}

}  // namespace ARRIERO_LEVEL
