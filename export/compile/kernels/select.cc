// The C functions: each goes on to the best level that this CPU has.
#define ARRIERO_LEVEL selection
#include "table.h"
#include "workspace.h"
#ifdef __aarch64__
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#ifdef __x86_64__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define LEVEL(name)               \
    namespace name {              \
    extern const Kernels kernels; \
    }

#ifdef __x86_64__
LEVEL(amx)
LEVEL(avx512vnni)
LEVEL(avx2)
LEVEL(scalar)
#endif
#ifdef __aarch64__
LEVEL(i8mm)
LEVEL(dotprod)
LEVEL(neon)
#endif

namespace {

#ifdef __x86_64__
bool has_avx512vnni() { return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512vnni"); }

// Linux saves tiles only for processes that ask for it, once for all threads (its documentation: x86/xstate).
bool may_use_tiles() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

struct Level {
    const Kernels* kernels;
    bool (*runs)();
};

// The best first; the last runs everywhere.
const Level LEVELS[] = {
#ifdef __x86_64__
    {&amx::kernels,
     [] {
         return has_avx512vnni() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
                may_use_tiles();
     }},
    {&avx512vnni::kernels, has_avx512vnni},
    {&avx2::kernels, [] { return __builtin_cpu_supports("x86-64-v3") != 0; }},
    {&scalar::kernels, [] { return true; }},
#endif
#ifdef __aarch64__
    {&i8mm::kernels, [] { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) && (getauxval(AT_HWCAP2) & HWCAP2_I8MM); }},
    {&dotprod::kernels, [] { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }},
    {&neon::kernels, [] { return true; }},
#endif
};

const Kernels* best() {
    for (const Level& level : LEVELS) {
        if (level.runs()) return level.kernels;
    }
    return nullptr;
}

const Kernels* chosen = nullptr;

const Kernels& kernels() {
    // threads that get here first at the same time find the same answer
    const Kernels* now = __atomic_load_n(&chosen, __ATOMIC_ACQUIRE);
    if (!now) __atomic_store_n(&chosen, now = best(), __ATOMIC_RELEASE);
    return *now;
}

}  // namespace

extern "C" const char* arriero_level(void) { return kernels().name; }

extern "C" int32_t arriero_use_level(const char* name) {
    for (const Level& level : LEVELS) {
        if (__builtin_strcmp(level.kernels->name, name) == 0 && level.runs()) {
            __atomic_store_n(&chosen, level.kernels, __ATOMIC_RELEASE);
            return 0;
        }
    }
    return 1;
}

extern "C" int64_t arriero_linear_workspace(int64_t format, int64_t block, int64_t T, int64_t N, int64_t K,
                                            int64_t parts) {
    return selection::LinearWorkspace(nullptr, format, block, T, N, K, 0, parts).bytes;
}

extern "C" int64_t arriero_dispatch_workspace(int64_t gate_up_format, int64_t gate_up_block, int64_t down_format,
                                              int64_t down_block, int64_t T, int64_t R, int64_t E, int64_t H, int64_t F,
                                              int64_t parts) {
    return selection::DispatchWorkspace(nullptr, gate_up_format, gate_up_block, down_format, down_block, T, R, E, H, F,
                                        parts)
        .bytes;
}

extern "C" int64_t arriero_attention_workspace(int64_t B, int64_t T, int64_t Q, int64_t G, int64_t C, int64_t D,
                                               int64_t parts) {
    return selection::attention_bytes(B, T, Q, G, C, D, parts);
}

extern "C" int64_t arriero_full_attention_workspace(int64_t L, int64_t D, int64_t parts) {
    return selection::full_workspace(nullptr, 0, L, D).bytes * parts;
}

extern "C" int32_t arriero_linear_prepare(int64_t format, int64_t block, const float* x, int64_t T, int64_t K,
                                          void* workspace, int64_t part, int64_t parts) {
    return kernels().linear_prepare(format, block, x, T, K, workspace, part, parts);
}

extern "C" int32_t arriero_linear(int64_t format, int64_t block, const float* x, const void* weight,
                                  const void* scales, float* y, int64_t T, int64_t N, int64_t K, void* workspace,
                                  int64_t part, int64_t parts) {
    return kernels().linear(format, block, x, weight, scales, y, T, N, K, workspace, part, parts);
}

extern "C" int32_t arriero_dispatch_prepare(int64_t gate_up_format, int64_t gate_up_block, int64_t down_format,
                                            int64_t down_block, const float* x, const int64_t* expert_id,
                                            const float* score, int64_t T, int64_t R, int64_t E, int64_t H, int64_t F,
                                            void* workspace, int64_t part, int64_t parts) {
    return kernels().dispatch_prepare(gate_up_format, gate_up_block, down_format, down_block, x, expert_id, score, T, R,
                                      E, H, F, workspace, part, parts);
}

extern "C" int32_t arriero_dispatch_gate_up(int64_t gate_up_format, int64_t gate_up_block, int64_t down_format,
                                            int64_t down_block, const void* const* records, int64_t first, int64_t end,
                                            int64_t at, int64_t scales_at, int64_t T, int64_t R, int64_t E, int64_t H,
                                            int64_t F, void* workspace, int64_t part, int64_t parts) {
    return kernels().dispatch_gate_up(gate_up_format, gate_up_block, down_format, down_block, records, first, end, at,
                                      scales_at, T, R, E, H, F, workspace, part, parts);
}

extern "C" int32_t arriero_dispatch_down(int64_t gate_up_format, int64_t gate_up_block, int64_t down_format,
                                         int64_t down_block, const void* const* records, int64_t first, int64_t end,
                                         int64_t at, int64_t scales_at, float* y, int64_t T, int64_t R, int64_t E,
                                         int64_t H, int64_t F, void* workspace, int64_t part, int64_t parts) {
    return kernels().dispatch_down(gate_up_format, gate_up_block, down_format, down_block, records, first, end, at,
                                   scales_at, y, T, R, E, H, F, workspace, part, parts);
}

extern "C" int32_t arriero_dispatch_sum(int64_t gate_up_format, int64_t gate_up_block, int64_t down_format,
                                        int64_t down_block, float* y, int64_t T, int64_t R, int64_t E, int64_t H,
                                        int64_t F, void* workspace, int64_t part, int64_t parts) {
    return kernels().dispatch_sum(gate_up_format, gate_up_block, down_format, down_block, y, T, R, E, H, F, workspace,
                                  part, parts);
}

extern "C" int32_t arriero_cache_write(int64_t format, const float* k, const float* v, const int64_t* positions,
                                       const int64_t* starts, const float* key_steps, const float* value_steps,
                                       void* key_cache, void* value_cache, int64_t B, int64_t G, int64_t C, int64_t D,
                                       int64_t chunk, int64_t part, int64_t parts) {
    return kernels().attention->cache_write(format, k, v, positions, starts, key_steps, value_steps, key_cache,
                                            value_cache, B, G, C, D, chunk, part, parts);
}

extern "C" int32_t arriero_attention(int64_t format, const float* q, const int64_t* positions, const int64_t* starts,
                                     const void* key_cache, const void* value_cache, const float* key_steps,
                                     const float* value_steps, float* out, int64_t B, int64_t T, int64_t Q, int64_t G,
                                     int64_t C, int64_t D, int64_t chunk, void* workspace, int64_t part,
                                     int64_t parts) {
    return kernels().attention->attention(format, q, positions, starts, key_cache, value_cache, key_steps, value_steps,
                                          out, B, T, Q, G, C, D, chunk, workspace, part, parts);
}

extern "C" int32_t arriero_attention_merge(const int64_t* positions, const int64_t* starts, const float* value_steps,
                                           float* out, int64_t B, int64_t Q, int64_t G, int64_t C, int64_t D,
                                           int64_t chunk, void* workspace, int64_t part, int64_t parts) {
    return kernels().attention->merge(positions, starts, value_steps, out, B, Q, G, C, D, chunk, workspace, part,
                                      parts);
}

extern "C" int32_t arriero_full_attention(const float* q, const float* k, const float* v, float* out, int64_t B,
                                          int64_t L, int64_t D, void* workspace, int64_t part, int64_t parts) {
    return kernels().attention->full(q, k, v, out, B, L, D, workspace, part, parts);
}
