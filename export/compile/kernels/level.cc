// All kernels at one level: compiled once for each, with -DARRIERO_LEVEL=<name> and that level's machine flags.
#include "table.h"
#if defined(__AVX512VNNI__)
#include "isa_avx512vnni.h"
#elif defined(__AVX2__)
#include "isa_avx2.h"
#elif defined(__aarch64__)
#include "isa_neon.h"
#else
#include "isa_scalar.h"
#endif
#include "dispatch.h"
#include "linear.h"
#ifdef __AMX_INT8__  // tiles do nothing for attention

namespace avx512vnni {
extern const AttentionKernels attention_kernels;
}
namespace ARRIERO_LEVEL {
using avx512vnni::attention_kernels;
}

#else
#include "full_attention.h"

namespace ARRIERO_LEVEL {

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels{cache_write, attention, attention_merge, full_attention};

}  // namespace ARRIERO_LEVEL

#endif
#define NAME_OF(level) #level
#define NAME(level) NAME_OF(level)

namespace ARRIERO_LEVEL {

extern const Kernels kernels;
const Kernels kernels{NAME(ARRIERO_LEVEL), linear_prepare, linear,       dispatch_prepare, dispatch_gate_up,
                      dispatch_down,       dispatch_sum,   &attention_kernels};

}  // namespace ARRIERO_LEVEL
