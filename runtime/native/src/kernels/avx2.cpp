// AVX2: vpmaddubsw adds two products of unsigned bytes (weights, biased by 8) with signed ones (inputs) to 16 bits,
// vpmaddwd adds those up to 32 bits. Two products of 8-bit weights exceed 16 bits: those are widened first.
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

// Sums of 16 outputs, for some rows: outputs 0 … 7 and 8 … 15.
template <int rows>
struct Sums {
    __m256i of[rows][2];

    template <Format format>
    OSP_INLINE void start(const CodeRows& x, int row) {
        OSP_UNROLL
        for (int n = 0; n < rows; ++n) of[n][0] = of[n][1] = _mm256_set1_epi32(offset_of<format>(x, row + n));
    }
};

// Four groups of 8 columns of 4-bit weights, whose products 16 bits hold: 8 pairs of 15 * 128 each.
constexpr int kGroupsIn16Bits = 4;

OSP_INLINE void add_pairs(__m256i& sum, __m256i weights, __m256i inputs) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, inputs));
    keep(sum);  // without this GCC 12 has a second copy of each sum
}

template <int rows>
OSP_INLINE void add_int4(const std::uint8_t* panel, const std::int8_t* codes, std::size_t stride, int groups,
                         Sums<rows>* sums) {
    const __m256i low_nibbles = _mm256_set1_epi8(15);
    __m256i pairs[rows][2] = {};
    for (int g = 0; g < groups; ++g, panel += kGroupBytes<Format::kInt4>, codes += 8) {
        __m256i first[2], second[2];
        OSP_UNROLL
        for (int half = 0; half < 2; ++half) {
            const __m256i both = load_codes(panel + 32 * half);
            first[half] = _mm256_and_si256(both, low_nibbles);
            second[half] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_nibbles);
        }
        OSP_UNROLL
        for (int n = 0; n < rows; ++n) {
            const std::int8_t* at = codes + n * stride;
            OSP_UNROLL
            for (int half = 0; half < 2; ++half) {
                add_pairs(pairs[n][half], first[half], broadcast4(at));
                add_pairs(pairs[n][half], second[half], broadcast4(at + 4));
            }
        }
    }
    const __m256i ones = _mm256_set1_epi16(1);
    OSP_UNROLL
    for (int n = 0; n < rows; ++n) {
        OSP_UNROLL
        for (int half = 0; half < 2; ++half)
            sums->of[n][half] = _mm256_add_epi32(sums->of[n][half], _mm256_madd_epi16(pairs[n][half], ones));
    }
}

// Four columns of 8-bit weights: the even ones and the odd ones, each as 16 bits.
template <int rows>
OSP_INLINE void add_int8(const std::uint8_t* panel, const std::int8_t* codes, std::size_t stride, Sums<rows>* sums) {
    __m256i even[2], odd[2];
    OSP_UNROLL
    for (int half = 0; half < 2; ++half) {
        const __m256i four = load_codes(panel + 32 * half);
        even[half] = _mm256_and_si256(four, _mm256_set1_epi16(255));
        odd[half] = _mm256_srli_epi16(four, 8);
    }
    OSP_UNROLL
    for (int n = 0; n < rows; ++n) {
        const __m256i four = broadcast4(codes + n * stride);
        const __m256i even_inputs = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8);
        const __m256i odd_inputs = _mm256_srai_epi16(four, 8);
        OSP_UNROLL
        for (int half = 0; half < 2; ++half) {
            const __m256i sum = _mm256_add_epi32(sums->of[n][half], _mm256_madd_epi16(even[half], even_inputs));
            sums->of[n][half] = _mm256_add_epi32(sum, _mm256_madd_epi16(odd[half], odd_inputs));
        }
    }
}

template <Format format>
struct IntegerTiles {
    template <int rows, int panels>
    static void tile(const CodeRows& x, int row, const Panels& w, int panel, float* y, std::size_t y_stride) {
        static_assert(panels == 1, "two panels have no room in 16 registers");
        const std::uint8_t* weights = panel_of(w, panel);
        const std::int8_t* codes = x.codes + static_cast<std::size_t>(row) * x.stride;
        Sums<rows> sums;
        sums.template start<format>(x, row);
        if constexpr (format == Format::kInt4) {
            const int groups = w.columns / 8;
            int g = 0;
            for (; g + kGroupsIn16Bits <= groups; g += kGroupsIn16Bits)
                add_int4(weights + 64 * g, codes + 8 * g, x.stride, kGroupsIn16Bits, &sums);
            if (g < groups) add_int4(weights + 64 * g, codes + 8 * g, x.stride, groups - g, &sums);
        } else {
            for (int k = 0; k < w.columns; k += 4) add_int8(weights + kLanes * k, codes + k, x.stride, &sums);
        }
        OSP_UNROLL
        for (int n = 0; n < rows; ++n)
            write_outputs({reinterpret_cast<NativeInts>(sums.of[n][0]), reinterpret_cast<NativeInts>(sums.of[n][1])}, x,
                          row + n, w, panel, y + n * y_stride);
    }
};

std::int64_t peak_dots(int rounds) {
    constexpr int chains = 8;
    repeat_dots<chains, __m256i, __m256i, __m256i>(rounds, [](auto& sum, auto weights, auto inputs) {
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, inputs));
    });
    return std::int64_t{32} * chains * rounds;
}

}  // namespace

extern const Kernel kAvx2Kernel;
const Kernel kAvx2Kernel =
    kernel_table("avx2", integer_product<IntegerTiles, Size<4, 1>, Size<2, 1>, Size<1, 1>>, peak_dots);

}  // namespace osp
