// What every kernel needs: shares of work, rows of a matrix, compile-time row counts. No standard library: an inline
// function of it, compiled at two levels, would be one symbol, and an old CPU could be given the new CPU's code.
#pragma once

#include <stdint.h>

#include "arriero_kernels.h"

#define UNROLL _Pragma("GCC unroll 16")
// Inner tiles are calls: there are many shapes of them, and inlined they would be compiled once per caller.
#define TILE __attribute__((noinline)) inline

namespace ARRIERO_LEVEL {

template <class T>
inline T smaller(T a, T b) {
    return a < b ? a : b;
}

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Whether activations are rounded to integers for it.
inline bool is_integer(int64_t format) {
    return format == ARRIERO_INT8 || format == ARRIERO_INT4 || format >= ARRIERO_INT8_F16;
}
// Whether a linear layer's activations are rounded in two steps, and the format without that.
inline bool is_twice(int64_t format) { return format >= ARRIERO_TWICE; }
inline int64_t plain(int64_t format) { return is_twice(format) ? format - ARRIERO_TWICE : format; }

// Whether the scales of integers are float16.
inline bool has_halves(int64_t format) { return format >= ARRIERO_INT8_F16; }

// Asks for what a stream of weights will need in a moment: what fetches by itself stops at the end of each 4 KiB page,
// and mapped files lie in such. GCC takes a function that only does this for one that does nothing, and drops its calls.
__attribute__((always_inline)) inline void fetch(const void* at) { __builtin_prefetch(at, 0, 3); }

struct Range {
    int64_t begin, end;
};

// The `part`-th of `parts` shares of `count` things, cut at multiples of `unit`.
inline Range share(int64_t count, int64_t unit, int64_t part, int64_t parts) {
    const int64_t units = (count + unit - 1) / unit;
    return {units * part / parts * unit, smaller(units * (part + 1) / parts * unit, count)};
}

// Rows of a matrix, picked by `order` if it is not null.
template <class T>
struct Rows {
    T* base;
    int64_t stride;
    const int64_t* order = nullptr;

    T* operator[](int64_t i) const { return base + (order ? order[i] : i) * stride; }
};

// to[0 .. count) = from, N numbers but at an edge. Of a length that it does not know, GCC copies 64 bytes with
// instructions that take as long as a short product.
template <int N>
inline void copy_numbers(float* to, const float* from, int64_t count) {
    if (count == N) {
        __builtin_memcpy(to, from, N * sizeof(float));
    } else {
        for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    }
}

template <int N>
struct Constant {
    static constexpr int value = N;
};

// Calls `function` with Constant 0 .. N - 1.
template <int N, class Function>
__attribute__((always_inline)) inline void each_of(Function function) {
    if constexpr (N > 1) each_of<N - 1>(function);
    function(Constant<N - 1>{});
}

// Calls `function` with the largest Constant that is at most M and at most `rows` (>= 1); gives it.
template <int M, class Function>
inline int64_t with_rows(int64_t rows, Function function) {
    if constexpr (M > 1) {
        if (rows < M) return with_rows<M - 1>(rows, function);
    }
    function(Constant<M>{});
    return M;
}

// The same with M or else 1, where shapes between them are not worth their code.
template <int M, class Function>
inline int64_t with_rows_or_one(int64_t rows, Function function) {
    if (rows >= M) {
        function(Constant<M>{});
        return M;
    }
    function(Constant<1>{});
    return 1;
}

}  // namespace ARRIERO_LEVEL
