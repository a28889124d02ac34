// What the machine can do at most: reading memory, int8 dot products, float32 multiply-adds. Built with -march=native.
#include <stdint.h>
#if defined(__AVX512VNNI__)
#include <immintrin.h>
typedef __m512i Ints;
static inline Ints dot(Ints sum, Ints a, Ints b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
typedef int32x4_t Ints;
static inline Ints dot(Ints sum, Ints a, Ints b) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
}
#elif defined(__AVX2__)
#include <immintrin.h>
typedef __m256i Ints;
static inline Ints dot(Ints sum, Ints a, Ints b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
#endif
#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef __aarch64__
#define REGISTER "w"
#else
#define REGISTER "v"
#endif
#ifdef __AVX512F__
typedef float Floats __attribute__((vector_size(64)));
#elif defined(__AVX__)
typedef float Floats __attribute__((vector_size(32)));
#else
typedef float Floats __attribute__((vector_size(16)));
#endif

extern "C" uint64_t read_sum(const uint64_t* p, int64_t bytes) {
    typedef uint64_t Words __attribute__((vector_size(64)));
    typedef uint64_t Unaligned __attribute__((vector_size(64), aligned(8)));  // as an array of numpy's may lie
    Words sums[8] = {};
    const Unaligned* w = reinterpret_cast<const Unaligned*>(p);
    int64_t i = 0;
    for (; i + 8 <= bytes / 64; i += 8) {
        for (int j = 0; j < 8; ++j) sums[j] += w[i + j];
    }
    uint64_t total = 0;
    for (int64_t rest = 8 * i; rest < bytes / 8; ++rest) total += p[rest];
    for (int j = 0; j < 8; ++j) {
        for (int k = 0; k < 8; ++k) total += sums[j][k];
    }
    return total;
}

#ifdef __AMX_INT8__
// Products of tiles of 16 rows of 64 bytes, four sums in turns.
static int64_t tile_dots(int64_t rounds) {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
    } shapes;
    __asm__ volatile("" : : "r"(&shapes) : "memory");
    _tile_loadconfig(&shapes);
    for (int64_t i = 0; i < rounds; ++i) {
        _tile_dpbsud(0, 4, 5);
        _tile_dpbsud(1, 4, 5);
        _tile_dpbsud(2, 4, 5);
        _tile_dpbsud(3, 4, 5);
    }
    _tile_release();
    return rounds * 4 * 16 * 16 * 64 * 2;
}
#endif

// Gives the operations done (a multiply and an add are two).
extern "C" int64_t int8_dots(int64_t rounds) {
#ifdef __AMX_INT8__
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0) return tile_dots(rounds);
#endif
    Ints sums[12] = {}, a = {}, b = {};
    for (int64_t i = 0; i < rounds; ++i) {
        for (int j = 0; j < 12; ++j) {
            // to the compiler new operands, or it would multiply once for all
            __asm__ volatile("" : "+" REGISTER(a), "+" REGISTER(b));
            sums[j] = dot(sums[j], a, b);
        }
        for (int j = 0; j < 12; ++j) __asm__ volatile("" : "+" REGISTER(sums[j]));
    }
    return rounds * 12 * sizeof(Ints) * 2;
}

extern "C" int64_t float_multiply_adds(int64_t rounds) {
    Floats sums[12] = {}, a = {}, b = {};
    for (int64_t i = 0; i < rounds; ++i) {
        for (int j = 0; j < 12; ++j) {
            __asm__ volatile("" : "+" REGISTER(a), "+" REGISTER(b));
            sums[j] += a * b;
        }
        for (int j = 0; j < 12; ++j) __asm__ volatile("" : "+" REGISTER(sums[j]));
    }
    return rounds * 12 * sizeof(Floats) / 4 * 2;
}
