// What the kernels ask of the GPU, as PTX. The tests put another file of this name in its place, for a CPU.
#pragma once

namespace arriero {

using u16 = unsigned short;
using u32 = unsigned int;

struct alignas(16) Quad {
    u32 word[4];
};

#define ARRIERO_DEVICE __device__ __forceinline__
// One variable in shared memory.
#define ARRIERO_SHARED(Type, name) __shared__ Type name

ARRIERO_DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// --- Global memory: nothing else reads or writes it -----------------------------------------------------------------

ARRIERO_DEVICE int load_int(const int* pointer) { return __ldg(pointer); }
ARRIERO_DEVICE float load_float(const float* pointer) { return __ldg(pointer); }
ARRIERO_DEVICE Quad load_quad(const void* pointer) {
    const uint4 words = __ldg(static_cast<const uint4*>(pointer));
    return {{words.x, words.y, words.z, words.w}};
}
ARRIERO_DEVICE void store_half(u16* pointer, u16 bits) { *pointer = bits; }

// 16 bytes into shared memory, past the first-level cache: for what one warp reads once. Zeros if not `valid`.
ARRIERO_DEVICE void copy_weights(Quad* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// 16 bytes through the first-level cache: for what other warps of this multiprocessor read too.
ARRIERO_DEVICE void copy_tokens(Quad* to, const void* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

ARRIERO_DEVICE void copy_scale(float* to, const float* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 4 : 0)
                 : "memory");
}

ARRIERO_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last `pending` commits have arrived, as far as this thread's own copies go.
template <int pending>
ARRIERO_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// --- Threads ---------------------------------------------------------------------------------------------------------

ARRIERO_DEVICE void block_barrier() { __syncthreads(); }
ARRIERO_DEVICE bool block_any(bool value) { return __syncthreads_or(value); }
ARRIERO_DEVICE void warp_barrier() { __syncwarp(); }
ARRIERO_DEVICE u32 warp_ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
ARRIERO_DEVICE int warp_shift_up(int value, int by) { return __shfl_up_sync(0xffffffffu, value, by); }
ARRIERO_DEVICE int warp_from(int value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
ARRIERO_DEVICE void count_shared(int* counter) { atomicAdd(counter, 1); }
ARRIERO_DEVICE int count_bits(u32 bits) { return __popc(bits); }
ARRIERO_DEVICE int lowest_bit(u32 bits) { return __ffs(bits) - 1; }

// --- Arithmetic ------------------------------------------------------------------------------------------------------

// x & mask | bits, in one instruction: by itself the compiler takes two where both are constants.
ARRIERO_DEVICE u32 and_or(u32 x, u32 mask, u32 bits) {
    u32 y;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
    return y;
}

// Bytes of the eight in a (0 .. 3) and b (4 .. 7), chosen by the nibbles of `selector`.
ARRIERO_DEVICE u32 choose_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

ARRIERO_DEVICE float exponential2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

ARRIERO_DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// sum += a b in one instruction, whose name tells the shapes and types; `in` is the constraint of a sum's register.
#define ARRIERO_MULTIPLY_TILE(name, Sum, in)                                                                          \
    static ARRIERO_DEVICE void multiply_tile(Sum (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {         \
        asm("mma.sync.aligned." name " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"               \
            : in(sum[0]), in(sum[1]), in(sum[2]), in(sum[3])                                                          \
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                                  \
    }

// A type of operands: a 32-bit word holds two or four values, the first one lowest.
struct Half {
    static ARRIERO_DEVICE u16 round(float x) {
        u16 bits;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
        return bits;
    }
    // a * b + c of pairs, rounded once
    static ARRIERO_DEVICE u32 multiply_add(u32 a, u32 b, u32 c) {
        u32 d;
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
        return d;
    }
    // sum[16x8] += a[16x16] b[16x8]
    ARRIERO_MULTIPLY_TILE("m16n8k16.row.col.f32.f16.f16.f32", float, "+f")
};

struct Bfloat {
    static ARRIERO_DEVICE u16 round(float x) {
        u16 bits;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
        return bits;
    }
    static ARRIERO_DEVICE u32 multiply_add(u32 a, u32 b, u32 c) {
        u32 d;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
        return d;
    }
    ARRIERO_MULTIPLY_TILE("m16n8k16.row.col.f32.bf16.bf16.f32", float, "+f")
};

// Signed bytes. sum[16x8] += a[16x32] b[32x8]
struct Int8Product {
    using Sum = int;
    ARRIERO_MULTIPLY_TILE("m16n8k32.row.col.s32.s8.s8.s32", int, "+r")
};

// E4M3 floats, from sm_89 on. In machine code this is QMMA on sm_89, 120 and 121; F2FP and HMMA, so widened to float16,
// on sm_90, 100, 103 and 110, whose own E4M3 products are other instructions, for whole warp groups.
struct E4m3Product {
    using Sum = float;
    static ARRIERO_DEVICE u32 narrow(u32 first, u32 second) {
        u32 bytes;
        asm("{\n\t.reg .b16 low, high;\n\t"
            "cvt.rn.satfinite.e4m3x2.f16x2 low, %1;\n\t"
            "cvt.rn.satfinite.e4m3x2.f16x2 high, %2;\n\t"
            "mov.b32 %0, {low, high};\n\t}"
            : "=r"(bytes)
            : "r"(first), "r"(second));
        return bytes;
    }
    ARRIERO_MULTIPLY_TILE("m16n8k32.row.col.f32.e4m3.e4m3.f32", float, "+f")
};

#undef ARRIERO_MULTIPLY_TILE

}  // namespace arriero
