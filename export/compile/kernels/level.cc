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
#include "attention.h"
#include "dispatch.h"
#include "linear.h"

#define NAME_OF(level) #level
#define NAME(level) NAME_OF(level)

namespace ARRIERO_LEVEL {

extern const Kernels kernels;
const Kernels kernels{NAME(ARRIERO_LEVEL), linear_prepare, linear,      dispatch_prepare, dispatch_gate_up,
                      dispatch_down,       dispatch_sum,   cache_write, attention,        attention_merge};

}  // namespace ARRIERO_LEVEL
