// Arm's 8-bit matrix extension, which multiplies unsigned bytes (weights, biased by 8 or 128) with signed ones (inputs):
// usdot for a single row, and for pairs of rows usmmla, a product of 2 outputs x 8 columns with 8 columns x 2 rows.
#include "../kernel_table.hpp"

namespace osp {
namespace {

// The codes of 4 outputs at 8 columns: k … k + 3 and k + 4 … k + 7.
template <Format format>
OSP_INLINE void load_group(const std::uint8_t* at, uint8x16_t* first, uint8x16_t* second) {
    if constexpr (format == Format::kInt4) {
        const uint8x16_t both = vld1q_u8(at);
        *first = vandq_u8(both, vdupq_n_u8(15));
        *second = vshrq_n_u8(both, 4);
    } else {
        *first = vld1q_u8(at);
        *second = vld1q_u8(at + 64);
    }
}

// The same as two outputs of 8 columns each.
OSP_INLINE void pair_outputs(uint8x16_t first, uint8x16_t second, uint8x16_t* outputs) {
    const uint32x4_t a = vreinterpretq_u32_u8(first), b = vreinterpretq_u32_u8(second);
    outputs[0] = vreinterpretq_u8_u32(vzip1q_u32(a, b));
    outputs[1] = vreinterpretq_u8_u32(vzip2q_u32(a, b));
}

template <Format format>
struct IntegerTiles {
    template <int rows, int panels>
    static void tile(const CodeRows& x, int row, const Panels& w, int panel, float* y, std::size_t y_stride) {
        static_assert(panels == 1, "there are not the registers for two panels");
        if constexpr (rows == 1)
            single_row(x, row, w, panel, y);
        else
            row_pairs<rows / 2>(x, row, w, panel, y, y_stride);
    }

    static void single_row(const CodeRows& x, int row, const Panels& w, int panel, float* y) {
        const std::uint8_t* weights = panel_of(w, panel);
        const std::int8_t* codes = x.codes + static_cast<std::size_t>(row) * x.stride;
        int32x4_t even[4], odd[4];  // outputs 0 … 3, 4 … 7, …; two sums each, to hide the latency
        OSP_UNROLL
        for (int q = 0; q < 4; ++q) even[q] = vdupq_n_s32(offset_of<format>(x, row)), odd[q] = vdupq_n_s32(0);
        for (int k = 0; k < w.columns; k += 8, weights += kGroupBytes<format>) {
            const int8x8_t inputs = vld1_s8(codes + k);
            OSP_UNROLL
            for (int q = 0; q < 4; ++q) {
                uint8x16_t first, second;
                load_group<format>(weights + 16 * q, &first, &second);
                even[q] = vusdotq_lane_s32(even[q], first, inputs, 0);
                odd[q] = vusdotq_lane_s32(odd[q], second, inputs, 1);
            }
        }
        OSP_UNROLL
        for (int q = 0; q < 4; ++q) even[q] = vaddq_s32(even[q], odd[q]);
        write_outputs({{even[0], even[1]}, {even[2], even[3]}}, x, row, w, panel, y);
    }

    template <int pairs>
    static void row_pairs(const CodeRows& x, int row, const Panels& w, int panel, float* y, std::size_t y_stride) {
        const std::uint8_t* weights = panel_of(w, panel);
        const std::int8_t* codes = x.codes + static_cast<std::size_t>(row) * x.stride;
        // [output 2 o of both rows, output 2 o + 1 of both rows]
        int32x4_t sums[pairs][kLanes / 2];
        OSP_UNROLL
        for (int n = 0; n < pairs; ++n) {
            const std::int32_t both[2] = {offset_of<format>(x, row + 2 * n), offset_of<format>(x, row + 2 * n + 1)};
            const int32x2_t offsets = vld1_s32(both);
            OSP_UNROLL
            for (int o = 0; o < kLanes / 2; ++o) sums[n][o] = vcombine_s32(offsets, offsets);
        }
        for (int k = 0; k < w.columns; k += 8, weights += kGroupBytes<format>) {
            int8x16_t inputs[pairs];
            OSP_UNROLL
            for (int n = 0; n < pairs; ++n) {
                const std::int8_t* at = codes + 2 * n * x.stride + k;
                inputs[n] = vcombine_s8(vld1_s8(at), vld1_s8(at + x.stride));
            }
            OSP_UNROLL
            for (int q = 0; q < 4; ++q) {
                uint8x16_t first, second, outputs[2];
                load_group<format>(weights + 16 * q, &first, &second);
                pair_outputs(first, second, outputs);
                OSP_UNROLL
                for (int n = 0; n < pairs; ++n) {
                    sums[n][2 * q] = vusmmlaq_s32(sums[n][2 * q], outputs[0], inputs[n]);
                    sums[n][2 * q + 1] = vusmmlaq_s32(sums[n][2 * q + 1], outputs[1], inputs[n]);
                }
            }
        }
        OSP_UNROLL
        for (int n = 0; n < pairs; ++n) {
            const auto& of = sums[n];
            write_outputs({{vuzp1q_s32(of[0], of[1]), vuzp1q_s32(of[2], of[3])},
                           {vuzp1q_s32(of[4], of[5]), vuzp1q_s32(of[6], of[7])}},
                          x, row + 2 * n, w, panel, y + 2 * n * y_stride);
            write_outputs({{vuzp2q_s32(of[0], of[1]), vuzp2q_s32(of[2], of[3])},
                           {vuzp2q_s32(of[4], of[5]), vuzp2q_s32(of[6], of[7])}},
                          x, row + 2 * n + 1, w, panel, y + (2 * n + 1) * y_stride);
        }
    }
};

std::int64_t peak_dots(int rounds) {
    constexpr int chains = 16;
    repeat_dots<chains, int32x4_t, uint8x16_t, int8x16_t>(
        rounds, [](auto& sum, auto weights, auto inputs) { sum = vusmmlaq_s32(sum, weights, inputs); });
    return std::int64_t{32} * chains * rounds;
}

}  // namespace

extern const Kernel kI8mmKernel;
const Kernel kI8mmKernel =
    kernel_table("neon-i8mm", integer_product<IntegerTiles, Size<4, 1>, Size<2, 1>, Size<1, 1>>, peak_dots);

}  // namespace osp
