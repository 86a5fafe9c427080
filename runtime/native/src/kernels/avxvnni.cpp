// AVX-VNNI: vpdpbusd on 256 bits multiplies unsigned bytes (weights, biased by 8 or 128) with signed ones (inputs).
#include "../kernel_table.hpp"

namespace osp {
namespace {

constexpr std::size_t kPrefetch = 1024;  // bytes ahead in a panel; panels follow one another

OSP_INLINE __m256i broadcast4(const std::int8_t* x) {
    std::int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm256_set1_epi32(four);
}

OSP_INLINE __m256i load_codes(const std::uint8_t* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at + kPrefetch), _MM_HINT_T0);
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
}

// The codes of 8 outputs at 8 columns: k … k + 3 and k + 4 … k + 7.
template <Format format>
OSP_INLINE void load_group(const std::uint8_t* at, __m256i* first, __m256i* second) {
    if constexpr (format == Format::kInt4) {
        const __m256i both = load_codes(at), low_nibbles = _mm256_set1_epi8(15);
        *first = _mm256_and_si256(both, low_nibbles);
        *second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_nibbles);
    } else {
        *first = load_codes(at);
        *second = load_codes(at + 64);
    }
}

OSP_INLINE __m256i plus_dots(__m256i sum, __m256i weights, __m256i inputs) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, weights, inputs);
#else
    return _mm256_dpbusd_epi32(sum, weights, inputs);  // the same instruction as AVX-512 encodes it
#endif
}

OSP_INLINE void add_dots(__m256i& sum, __m256i weights, __m256i inputs) {
    sum = plus_dots(sum, weights, inputs);
    keep(sum);  // without this GCC 12 has a second copy of each sum
}

template <Format format>
struct IntegerTiles {
    // One row takes two sums for each output, so that enough dot products are in flight to hide their latency.
    template <int rows>
    static constexpr int kChains = rows > 2 ? 1 : 2;

    template <int rows, int panels>
    static void tile(const CodeRows& x, int row, const Panels& w, int first_panel, float* y, std::size_t y_stride) {
        constexpr int chains = kChains<rows>, last = chains - 1;
        const std::uint8_t* panel = panel_of(w, first_panel);
        const std::int8_t* codes = x.codes + static_cast<std::size_t>(row) * x.stride;
        __m256i sums[rows][panels][2][chains];  // 2: outputs 0 … 7 and 8 … 15
        OSP_UNROLL
        for (int n = 0; n < rows; ++n) {
            OSP_UNROLL
            for (int p = 0; p < panels; ++p) {
                OSP_UNROLL
                for (int half = 0; half < 2; ++half) {
                    sums[n][p][half][last] = _mm256_setzero_si256();
                    sums[n][p][half][0] = _mm256_set1_epi32(offset_of<format>(x, row + n));
                }
            }
        }
        for (int k = 0; k < w.columns; k += 8, panel += kGroupBytes<format>) {
            __m256i first[panels][2], second[panels][2];
            OSP_UNROLL
            for (int p = 0; p < panels; ++p) {
                OSP_UNROLL
                for (int half = 0; half < 2; ++half)
                    load_group<format>(panel + p * w.panel_bytes + 32 * half, &first[p][half], &second[p][half]);
            }
            OSP_UNROLL
            for (int n = 0; n < rows; ++n) {
                const std::int8_t* at = codes + n * x.stride + k;
                OSP_UNROLL
                for (int p = 0; p < panels; ++p) {
                    OSP_UNROLL
                    for (int half = 0; half < 2; ++half) {
                        add_dots(sums[n][p][half][0], first[p][half], broadcast4(at));
                        add_dots(sums[n][p][half][last], second[p][half], broadcast4(at + 4));
                    }
                }
            }
        }
        OSP_UNROLL
        for (int n = 0; n < rows; ++n) {
            OSP_UNROLL
            for (int p = 0; p < panels; ++p) {
                NativeInts halves[2];
                OSP_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const auto& sum = sums[n][p][half];
                    halves[half] =
                        reinterpret_cast<NativeInts>(chains == 1 ? sum[0] : _mm256_add_epi32(sum[0], sum[last]));
                }
                write_outputs({halves[0], halves[1]}, x, row + n, w, first_panel + p, y + n * y_stride + p * kLanes);
            }
        }
    }
};

std::int64_t peak_dots(int rounds) {
    constexpr int chains = 12;
    repeat_dots<chains, __m256i, __m256i, __m256i>(
        rounds, [](auto& sum, auto weights, auto inputs) { sum = plus_dots(sum, weights, inputs); });
    return std::int64_t{32} * chains * rounds;
}

}  // namespace

extern const Kernel kAvxVnniKernel;
const Kernel kAvxVnniKernel =
    kernel_table("avx-vnni", integer_product<IntegerTiles, Size<5, 1>, Size<2, 1>, Size<1, 2>>, peak_dots);

}  // namespace osp
