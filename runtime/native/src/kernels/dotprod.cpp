// Arm's dot product extension: sdot multiplies signed bytes with signed bytes. Biased 4-bit codes (0 … 15) are signed
// bytes as they are; 8-bit ones lose their bias.
#include "../kernel_table.hpp"

namespace osp {
namespace {

// The codes of 4 outputs at 8 columns: k … k + 3 and k + 4 … k + 7.
template <Format format>
OSP_INLINE void load_group(const std::uint8_t* at, int8x16_t* first, int8x16_t* second) {
    if constexpr (format == Format::kInt4) {
        const uint8x16_t both = vld1q_u8(at);
        *first = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
        *second = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
    } else {
        const uint8x16_t bias = vdupq_n_u8(128);
        *first = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(at), bias));
        *second = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(at + 64), bias));
    }
}

template <Format format>
struct IntegerTiles {
    template <int rows, int panels>
    static void tile(const CodeRows& x, int row, const Panels& w, int panel, float* y, std::size_t y_stride) {
        static_assert(panels == 1, "four registers an output and row leave no room for a second panel");
        const std::uint8_t* weights = panel_of(w, panel);
        const std::int8_t* codes = x.codes + static_cast<std::size_t>(row) * x.stride;
        constexpr int chains = rows == 1 ? 2 : 1, last = chains - 1;  // two sums of one row, to hide the latency
        int32x4_t sums[rows][4][chains];                              // outputs 0 … 3, 4 … 7, …
        OSP_UNROLL
        for (int n = 0; n < rows; ++n) {
            OSP_UNROLL
            for (int q = 0; q < 4; ++q) {
                sums[n][q][last] = vdupq_n_s32(0);
                sums[n][q][0] = vdupq_n_s32(format == Format::kInt4 ? offset_of<format>(x, row + n) : 0);
            }
        }
        for (int k = 0; k < w.columns; k += 8, weights += kGroupBytes<format>) {
            int8x8_t inputs[rows];
            OSP_UNROLL
            for (int n = 0; n < rows; ++n) inputs[n] = vld1_s8(codes + n * x.stride + k);
            OSP_UNROLL
            for (int q = 0; q < 4; ++q) {
                int8x16_t first, second;
                load_group<format>(weights + 16 * q, &first, &second);
                OSP_UNROLL
                for (int n = 0; n < rows; ++n) {
                    sums[n][q][0] = vdotq_lane_s32(sums[n][q][0], first, inputs[n], 0);
                    sums[n][q][last] = vdotq_lane_s32(sums[n][q][last], second, inputs[n], 1);
                }
            }
        }
        OSP_UNROLL
        for (int n = 0; n < rows; ++n) {
            int32x4_t of[4];
            OSP_UNROLL
            for (int q = 0; q < 4; ++q)
                of[q] = chains == 1 ? sums[n][q][0] : vaddq_s32(sums[n][q][0], sums[n][q][last]);
            write_outputs({{of[0], of[1]}, {of[2], of[3]}}, x, row + n, w, panel, y + n * y_stride);
        }
    }
};

std::int64_t peak_dots(int rounds) {
    constexpr int chains = 16;
    repeat_dots<chains, int32x4_t, int8x16_t, int8x16_t>(
        rounds, [](auto& sum, auto weights, auto inputs) { sum = vdotq_s32(sum, weights, inputs); });
    return std::int64_t{16} * chains * rounds;
}

}  // namespace

extern const Kernel kDotprodKernel;
const Kernel kDotprodKernel =
    kernel_table("neon-dotprod", integer_product<IntegerTiles, Size<5, 1>, Size<2, 1>, Size<1, 1>>, peak_dots);

}  // namespace osp
