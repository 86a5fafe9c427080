// AVX-512 with VNNI: vpdpbusd multiplies unsigned bytes (weights, biased by 8 or 128) with signed ones (inputs).
#include "../kernel_table.hpp"

namespace osp {
namespace {

constexpr std::size_t kPrefetch = 4096;  // bytes ahead in a panel; panels follow one another

OSP_INLINE __m512i broadcast4(const std::int8_t* x) {
    std::int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
}

OSP_INLINE void add_dots(__m512i& sum, __m512i weights, __m512i inputs) {
    sum = _mm512_dpbusd_epi32(sum, weights, inputs);
    keep(sum);  // without this GCC 12 has a second copy of each sum, and the largest tile on the stack
}

// The codes of 8 columns: k … k + 3 and k + 4 … k + 7.
template <Format format>
OSP_INLINE void load_group(const std::uint8_t* at, __m512i* first, __m512i* second) {
    _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetch), _MM_HINT_T0);
    if constexpr (format == Format::kInt4) {
        const __m512i both = _mm512_load_si512(at), low_nibbles = _mm512_set1_epi8(15);
        *first = _mm512_and_si512(both, low_nibbles);
        *second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_nibbles);
    } else {
        _mm_prefetch(reinterpret_cast<const char*>(at + 64 + kPrefetch), _MM_HINT_T0);
        *first = _mm512_load_si512(at);
        *second = _mm512_load_si512(at + 64);
    }
}

template <Format format>
struct IntegerTiles {
    // Few rows take several sums for each output, so that enough dot products are in flight to hide their latency.
    template <int rows, int panels>
    static constexpr int kChains = rows * panels >= 24 ? 1 : (rows * panels >= 8 ? 2 : (rows * panels > 1 ? 4 : 8));

    template <int rows, int panels>
    static void tile(const CodeRows& x, int row, const Panels& w, int first_panel, float* y, std::size_t y_stride) {
        constexpr int chains = kChains<rows, panels>;
        constexpr int groups = chains > 2 ? chains / 2 : 1;  // of 8 columns, a round
        const std::uint8_t* panel = panel_of(w, first_panel);
        const std::int8_t* codes = x.codes + static_cast<std::size_t>(row) * x.stride;

        __m512i sums[rows][panels][chains];
        OSP_UNROLL
        for (int n = 0; n < rows; ++n) {
            OSP_UNROLL
            for (int p = 0; p < panels; ++p) {
                sums[n][p][0] = _mm512_set1_epi32(offset_of<format>(x, row + n));
                OSP_UNROLL
                for (int c = 1; c < chains; ++c) sums[n][p][c] = _mm512_setzero_si512();
            }
        }
        const auto add_group = [&](int k, int g) __attribute__((always_inline)) {
            __m512i first[panels], second[panels];
            OSP_UNROLL
            for (int p = 0; p < panels; ++p)
                load_group<format>(panel + p * w.panel_bytes + g * kGroupBytes<format>, &first[p], &second[p]);
            OSP_UNROLL
            for (int n = 0; n < rows; ++n) {
                const std::int8_t* at = codes + n * x.stride + k + 8 * g;
                OSP_UNROLL
                for (int p = 0; p < panels; ++p) {
                    auto& mine = sums[n][p];
                    add_dots(mine[2 * g % chains], first[p], broadcast4(at));
                    add_dots(mine[(2 * g + 1) % chains], second[p], broadcast4(at + 4));
                }
            }
        };
        int k = 0;
        for (; k + 8 * groups <= w.columns; k += 8 * groups, panel += groups * kGroupBytes<format>) {
            OSP_UNROLL
            for (int g = 0; g < groups; ++g) add_group(k, g);
        }
        if constexpr (groups > 1)
            for (; k < w.columns; k += 8, panel += kGroupBytes<format>) add_group(k, 0);

        OSP_UNROLL
        for (int n = 0; n < rows; ++n) {
            OSP_UNROLL
            for (int p = 0; p < panels; ++p) {
                __m512i sum = sums[n][p][0];
                OSP_UNROLL
                for (int c = 1; c < chains; ++c) sum = _mm512_add_epi32(sum, sums[n][p][c]);
                write_outputs(reinterpret_cast<Ints>(sum), x, row + n, w, first_panel + p,
                              y + n * y_stride + p * kLanes);
            }
        }
    }
};

std::int64_t peak_dots(int rounds) {
    constexpr int chains = 16;
    repeat_dots<chains, __m512i, __m512i, __m512i>(
        rounds, [](auto& sum, auto weights, auto inputs) { sum = _mm512_dpbusd_epi32(sum, weights, inputs); });
    return std::int64_t{64} * chains * rounds;
}

}  // namespace

extern const Kernel kAvx512Kernel;
const Kernel kAvx512Kernel =
    kernel_table("avx512-vnni",
                 integer_product<IntegerTiles, Size<12, 2>, Size<8, 1>, Size<4, 1>, Size<2, 1>, Size<1, 1>>, peak_dots);

}  // namespace osp
