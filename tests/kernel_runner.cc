// Runs kernel calls that Python wrote to a file, for machines that are emulated and have no Python.
//
// runner LEVEL PARTS IN OUT. IN: i64 count of arguments, then each as i64 kind and its value: 0 a scalar i64, 1 a
// buffer as i64 size and its bytes. The first argument is the operation: 0 linear, 1 dispatch, 2 attention, 3 full
// attention, with the rest in the order that tests/kernel_emulated.py writes. OUT: the bytes of the buffers that the
// operation writes.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "arriero_kernels.h"

static std::vector<int64_t> scalars;
static std::vector<std::vector<char>> buffers;

template <class T>
static T* buffer(size_t i) {
    return buffers[i].empty() ? nullptr : reinterpret_cast<T*>(buffers[i].data());
}

static void read(FILE* file, void* to, size_t size) {
    if (fread(to, 1, size, file) != size) exit(3);
}

int main(int, char** arguments) {
    if (arriero_use_level(arguments[1])) return 2;
    const int64_t parts = atoll(arguments[2]);
    FILE* in = fopen(arguments[3], "rb");
    int64_t count;
    for (read(in, &count, 8); count > 0; --count) {
        int64_t kind, value;
        read(in, &kind, 8);
        read(in, &value, 8);
        if (kind == 0) {
            scalars.push_back(value);
        } else {
            buffers.emplace_back(value);
            read(in, buffers.back().data(), value);
        }
    }
    const int64_t* s = scalars.data() + 1;
    auto* f = buffer<float>;
    const auto workspace = [](int64_t size) { return aligned_alloc(64, (size + 127) / 64 * 64); };
    std::vector<size_t> written;
    if (scalars[0] == 0) {  // format, block, T, N, K; x, weight, scales, y
        void* space = workspace(arriero_linear_workspace(s[0], s[1], s[2], s[3], s[4], parts));
        for (int64_t p = 0; p < parts; ++p) arriero_linear_prepare(s[0], s[1], f(0), s[2], s[4], space, p, parts);
        for (int64_t p = 0; p < parts; ++p) {
            arriero_linear(s[0], s[1], f(0), f(1), f(2), f(3), s[2], s[3], s[4], space, p, parts);
        }
        written = {3};
    } else if (scalars[0] == 1) {  // 4 of formats and blocks, T, R, E, H, F, 4 offsets; x, id, score, records, y
        void* space =
            workspace(arriero_dispatch_workspace(s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], parts));
        std::vector<const void*> records;
        for (int64_t e = 0; e < s[6]; ++e) records.push_back(buffer<char>(3) + e * (buffers[3].size() / s[6]));
        for (int64_t p = 0; p < parts; ++p) {
            arriero_dispatch_prepare(s[0], s[1], s[2], s[3], f(0), buffer<int64_t>(1), f(2), s[4], s[5], s[6], s[7],
                                     s[8], space, p, parts);
        }
        for (int64_t p = 0; p < parts; ++p) {
            arriero_dispatch_gate_up(s[0], s[1], s[2], s[3], records.data(), 0, s[4] * s[5], s[9], s[10], s[4], s[5], s[6],
                                     s[7], s[8], space, p, parts);
        }
        for (int64_t p = 0; p < parts; ++p) {
            arriero_dispatch_down(s[0], s[1], s[2], s[3], records.data(), 0, s[4] * s[5], s[11], s[12], f(4), s[4], s[5],
                                  s[6], s[7], s[8], space, p, parts);
        }
        for (int64_t p = 0; p < parts; ++p) {
            arriero_dispatch_sum(s[0], s[1], s[2], s[3], f(4), s[4], s[5], s[6], s[7], s[8], space, p, parts);
        }
        written = {4};
    } else if (scalars[0] == 3) {  // B, L, D; q, k, v, out
        void* space = workspace(arriero_full_attention_workspace(s[1], s[2], parts));
        for (int64_t p = 0; p < parts; ++p) {
            arriero_full_attention(f(0), f(1), f(2), f(3), s[0], s[1], s[2], space, p, parts);
        }
        written = {3};
    } else {  // format, B, T, Q, G, C, D, chunk; q, k, v, positions, key cache, value cache, their steps, out, starts
        void* space = workspace(arriero_attention_workspace(s[1], s[2], s[3], s[4], s[5], s[6], parts));
        const int64_t *positions = buffer<int64_t>(3), *starts = buffer<int64_t>(9);
        for (int64_t p = 0; p < parts; ++p) {
            arriero_cache_write(s[0], f(1), f(2), positions, starts, f(6), f(7), f(4), f(5), s[1], s[4], s[5], s[6],
                                s[7], p, parts);
        }
        for (int64_t p = 0; p < parts; ++p) {
            arriero_attention(s[0], f(0), positions, starts, f(4), f(5), f(6), f(7), f(8), s[1], s[2], s[3], s[4], s[5],
                              s[6], s[7], space, p, parts);
        }
        for (int64_t p = 0; p < parts; ++p) {
            arriero_attention_merge(positions, starts, f(7), f(8), s[1], s[3], s[4], s[5], s[6], s[7], space, p, parts);
        }
        written = {4, 5, 8};
    }
    FILE* out = fopen(arguments[4], "wb");
    for (size_t i : written) fwrite(buffers[i].data(), 1, buffers[i].size(), out);
    return fclose(out);
}
