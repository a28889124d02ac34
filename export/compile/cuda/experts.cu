// The kernels' entry points: those that ARRIERO_KERNELS names, such as GATE_UP(decode, Half, f16, INT4).
#include "arriero_experts.h"

namespace arriero {

template <class Form, class Op>
ARRIERO_DEVICE Stack<Form> stack_of(const Op& op, const void* weights, const float* scales) {
    return {static_cast<const char*>(weights), scales, op.matrix_outputs(), op.matrix_inputs(), op.sizes.block};
}

#define SIZES int tokens, int choices, int experts, int hidden, int ffn, int block
// Threads of a block, and blocks of a multiprocessor: as many as registers allow without spills.
#if __CUDA_ARCH__ > 900
#define BLOCKS_OF_EIGHT 2
#else
#define BLOCKS_OF_EIGHT 3
#endif
#define BOUNDS_decode(Form) \
    __launch_bounds__(DecodeShared<Form>::THREADS, Form::DECODE_WARPS == 8 ? BLOCKS_OF_EIGHT : 4)
#define BOUNDS_prefill(Form) __launch_bounds__(PREFILL_THREADS, 2)
#define ENTRY(shape, Form) extern "C" __global__ void BOUNDS_##shape(Form)

#define GATE_UP_ENTRY(shape, Act, name, Form)                                                                   \
    ENTRY(shape, Form) gate_up_##shape##_##name(const u16* x, const int* expert_id, const float* score,         \
                                                const void* gate_up, const float* scales, SIZES, u16* inner) {  \
        const GateUp<Act> op{{tokens, choices, experts, hidden, ffn, block}, score, inner};                     \
        shape(op, expert_id, x, stack_of<Form>(op, gate_up, scales));                                           \
    }
#define DOWN_ENTRY(shape, Act, name, Form)                                                                      \
    ENTRY(shape, Form) down_##shape##_##name(const u16* inner, const int* expert_id, const void* down,          \
                                             const float* scales, SIZES, u16* y) {                              \
        const Down<Act, Form::scales == Scales::channel> op{{tokens, choices, experts, hidden, ffn, block}, y}; \
        shape(op, expert_id, inner, stack_of<Form>(op, down, scales));                                          \
    }

// One per form: ENTRY_OF is one of the two above, `act` the activation type's name.
#define EXACT(ENTRY_OF, shape, Act, act) ENTRY_OF(shape, Act, act##_exact, Exact<Act>)
#define INT8(ENTRY_OF, shape, Act, act) ENTRY_OF(shape, Act, act##_int8, Int8)
#define FP8(ENTRY_OF, shape, Act, act) ENTRY_OF(shape, Act, act##_fp8, Fp8)
#define INT4(ENTRY_OF, shape, Act, act) ENTRY_OF(shape, Act, act##_int4, Int4<Act>)

#define GATE_UP(shape, Act, act, FORM) FORM(GATE_UP_ENTRY, shape, Act, act)
#define DOWN(shape, Act, act, FORM) FORM(DOWN_ENTRY, shape, Act, act)

ARRIERO_KERNELS

}  // namespace arriero
