// The integer tile with the int8 matrix instruction of aarch64 (i8mm): two rows by two outputs, eight features at a
// time.
#pragma once

#include "block_scales.h"
#include "codes.h"
#include "rounded.h"

namespace ARRIERO_LEVEL {

// What int_tile gives, for M > 1 rows. An odd last row is paired with itself.
template <class CODES, int M, int P>
TILE void int_pair_tile(const Rounded& x, PickedRows rows, const uint8_t* panel, BlockScales scale,
                        float out[M][16 * P]) {
    constexpr int PAIRS = (M + 1) / 2, Q = CODES::QUADS, QUADS = Q < 2 ? 2 : Q;
    const int64_t features = x.features, blocks = x.blocks();
    for (int m = 0; m < M; ++m) __builtin_memset(out[m], 0, sizeof out[m]);
    for (int p = 0; p < P; ++p) {
        const uint8_t* at = panel + p * features * 2 * CODES::BITS;
        for (int64_t j = 0; j < blocks; ++j, scale = scale.from(16)) {
            int32x4_t totals[PAIRS][8];  // of outputs 2n and 2n + 1: first row's two, then second row's two
            UNROLL for (int i = 0; i < PAIRS; ++i) {
                const int32x2_t first = vdup_n_s32(x.corrections[rows[2 * i] * blocks + j]);
                const int32x2_t second = vdup_n_s32(x.corrections[rows[smaller(2 * i + 1, M - 1)] * blocks + j]);
                UNROLL for (int n = 0; n < 8; ++n) totals[i][n] = vcombine_s32(first, second);
            }
            for (int64_t k = j * x.block; k < (j + 1) * x.block; k += 4 * QUADS, at += QUADS / Q * STEP_BYTES<CODES>) {
                each_of<QUADS / 2>([&](auto number) {
                    constexpr int FIRST = 2 * decltype(number)::value, SECOND = FIRST + 1;
                    const int8_t* from = x.values + k + 4 * FIRST;
                    int8x16_t values[PAIRS];
                    UNROLL for (int i = 0; i < PAIRS; ++i) {
                        values[i] = vcombine_s8(vld1_s8(from + rows[2 * i] * features),
                                                vld1_s8(from + rows[smaller(2 * i + 1, M - 1)] * features));
                    }
                    UNROLL for (int n = 0; n < 8; n += 2) {
                        // four neighbouring features each of four outputs
                        const auto low = CODES::read(at + FIRST / Q * STEP_BYTES<CODES>, n / 2);
                        const auto high = CODES::read(at + SECOND / Q * STEP_BYTES<CODES>, n / 2);
                        const int32x4_t a = vreinterpretq_s32_s8(CODES::template weights<FIRST % Q>(low));
                        const int32x4_t b = vreinterpretq_s32_s8(CODES::template weights<SECOND % Q>(high));
                        const int8x16_t one = vreinterpretq_s8_s32(vzip1q_s32(a, b));
                        const int8x16_t two = vreinterpretq_s8_s32(vzip2q_s32(a, b));
                        UNROLL for (int i = 0; i < PAIRS; ++i) {
                            totals[i][n] = vmmlaq_s32(totals[i][n], values[i], one);
                            totals[i][n + 1] = vmmlaq_s32(totals[i][n + 1], values[i], two);
                        }
                    }
                });
            }
            UNROLL for (int i = 0; i < PAIRS; ++i) {
                UNROLL for (int n = 0; n < 8; n += 2) {
                    const int64x2_t a = vreinterpretq_s64_s32(totals[i][n]),
                                    b = vreinterpretq_s64_s32(totals[i][n + 1]);
                    const Int both[2] = {vreinterpretq_s32_s64(vzip1q_s64(a, b)),
                                         vreinterpretq_s32_s64(vzip2q_s64(a, b))};
                    const Float scales = scale.load_at(2 * n);
                    for (int m = 2 * i; m < smaller(2 * i + 2, M); ++m) {
                        float* to = out[m] + 16 * p + 2 * n;
                        const Float row_scale = all(x.scales[rows[m] * blocks + j]);
                        store(to, fma(mul(scales, row_scale), to_float(both[m - 2 * i]), load(to)));
                    }
                }
            }
        }
    }
}

}  // namespace ARRIERO_LEVEL
