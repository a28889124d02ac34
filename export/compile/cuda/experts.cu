// The kernels' entry points: those that ARRIERO_KERNELS names, such as GATE_UP(decode, Half, f16, INT4).
#include "arriero_experts.h"

namespace arriero {

template <class Form, class Op>
ARRIERO_DEVICE Stack<Form> stack_of(const Op& op, const void* weights, const float* scales) {
    return {static_cast<const char*>(weights), scales, op.matrix_outputs(), op.matrix_inputs(), op.sizes.block};
}

}  // namespace arriero

#define SIZES int tokens, int choices, int experts, int hidden, int ffn, int block
// Blocks of a multiprocessor: what shared memory leaves room for on the smaller GPUs, and registers without spills.
#define BLOCKS_decode 4
#define BLOCKS_prefill 2
#define ENTRY(shape) extern "C" __global__ void __launch_bounds__(arriero::THREADS, BLOCKS_##shape)

#define GATE_UP_ENTRY(shape, Act, name, Form)                                                                   \
    ENTRY(shape) gate_up_##shape##_##name(const arriero::u16* x, const int* expert_id, const float* score,      \
                                   const void* gate_up, const float* scales, SIZES, arriero::u16* inner) {      \
        using namespace arriero;                                                                                \
        const GateUp<Act> op{{tokens, choices, experts, hidden, ffn, block}, score, inner};                     \
        shape(op, expert_id, x, stack_of<Form>(op, gate_up, scales));                                           \
    }
#define DOWN_ENTRY(shape, Act, name, Form)                                                                      \
    ENTRY(shape) down_##shape##_##name(const arriero::u16* inner, const int* expert_id, const void* down,       \
                                const float* scales, SIZES, arriero::u16* y) {                                  \
        using namespace arriero;                                                                                \
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
