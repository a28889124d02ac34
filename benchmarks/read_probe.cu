// Reads memory and writes none of it: the bandwidth that a kernel which only reads can have at most.
//
// `quads` 16-byte words, a multiple of 2048; a block of 256 threads has eight of each thread's in flight at once.
extern "C" __global__ void __launch_bounds__(256) read_probe(const uint4* from, unsigned long long quads, unsigned* out) {
    unsigned all = 0;
    const unsigned long long stride = 2048ull * gridDim.x;
    for (unsigned long long at = 2048ull * blockIdx.x + threadIdx.x; at < quads; at += stride) {
        uint4 part[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) part[i] = __ldcs(from + at + 256 * i);
#pragma unroll
        for (int i = 0; i < 8; ++i) all ^= part[i].x ^ part[i].y ^ part[i].z ^ part[i].w;
    }
    // hardly ever true of what is read, which the compiler cannot know
    if (all == 0x5eed1e55u) *out = all;
}
