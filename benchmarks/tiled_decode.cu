// A variant to be measured: int4 decode kernels whose weights of 16 outputs and a group lie together, 1 KB in a row.
//
// The product's rows lie apart, so that a warp's copy reads 64 bytes of each of eight rows; here it reads 512 bytes that
// follow each other. Gates and ups take turns by eights, so that Gate-and-Up's tiles are neighbours as Down's are.
// Appended to the product's sources; gpu_layer.py lays the weights out.

namespace arriero {

template <class Form>
struct Tiled : Form {};

// [E, N / 16, group, row of 16, 64 bytes]
template <class Form>
struct Stack<Tiled<Form>> : Stack<Form> {
    static constexpr size_t GROUP_BYTES = 1024;
    ARRIERO_DEVICE const char* lane_start(int expert, int output, int lane) const {
        const size_t tile = this->row(expert, output) / 16;
        return this->weights + tile * this->groups() * GROUP_BYTES + output % 16 * 64 + 16 * lane;
    }
};

template <class Act>
struct TiledGateUp : GateUp<Act> {
    ARRIERO_DEVICE int half(int first, int which) const { return 2 * first + 8 * which; }
};

}  // namespace arriero

DOWN_ENTRY(decode, Half, f16_int4_tiled, Tiled<Int4<Half>>)
ENTRY(decode) gate_up_decode_f16_int4_tiled(const arriero::u16* x, const int* expert_id, const float* score,
                                            const void* gate_up, const float* scales, SIZES, arriero::u16* inner) {
    using namespace arriero;
    const TiledGateUp<Half> op{{{tokens, choices, experts, hidden, ffn, block}, score, inner}};
    decode(op, expert_id, x, stack_of<Tiled<Int4<Half>>>(op, gate_up, scales));
}
