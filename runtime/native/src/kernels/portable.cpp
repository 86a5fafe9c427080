// Plain C++ for any processor: the compiler turns its loops over 16 outputs into what vectors there are.
#include "../attention.hpp"
#include "../float_product.hpp"
#include "../tiles.hpp"

namespace osp {
namespace {

template <Format format>
struct IntegerTiles {
    static constexpr int kBitsOfCode = format == Format::kInt4 ? 4 : 8;
    static constexpr int kColumnsOfWord = 32 / kBitsOfCode;
    // Products that 16 bits hold the sum of: 8 times 15 * 128, once 255 * 128.
    static constexpr int kColumnsIn16Bits = format == Format::kInt4 ? 8 : 1;

    // Biased codes of 16 outputs, a word each, as [columns][outputs] of 16 bits.
    static void unpack(const std::uint8_t* panel, std::int16_t (&weights)[kColumnsOfWord][kLanes]) {
        std::uint32_t words[kLanes];
        std::memcpy(words, panel, sizeof words);
        for (int j = 0; j < kColumnsOfWord; ++j) {
            // Four bits: columns 0 … 3 are the low nibbles of the four bytes, 4 … 7 the high ones.
            const int shift = 8 * (j % 4) + 4 * (j / 4);
            for (int r = 0; r < kLanes; ++r)
                weights[j][r] = static_cast<std::int16_t>((words[r] >> shift) & ((1u << kBitsOfCode) - 1));
        }
    }

    static void add(const std::int16_t (&weights)[kColumnsOfWord][kLanes], const std::int8_t* inputs,
                    std::uint32_t (&sums)[kLanes]) {
        for (int start = 0; start < kColumnsOfWord; start += kColumnsIn16Bits) {
            std::int16_t some[kLanes] = {};
            for (int j = start; j < start + kColumnsIn16Bits; ++j) {
                const std::int16_t input = inputs[j];
                for (int r = 0; r < kLanes; ++r) some[r] = static_cast<std::int16_t>(some[r] + weights[j][r] * input);
            }
            for (int r = 0; r < kLanes; ++r) sums[r] += static_cast<std::uint32_t>(some[r]);
        }
    }

    template <int rows, int panels>
    static void tile(const CodeRows& x, int row, const Panels& w, int panel, float* y, std::size_t y_stride) {
        static_assert(panels == 1, "two panels have no room in 16 registers");
        const std::int8_t* codes = x.codes + static_cast<std::size_t>(row) * x.stride;
        const std::uint8_t* at = panel_of(w, panel);
        std::uint32_t sums[rows][kLanes];  // modulo 2^32
        for (int n = 0; n < rows; ++n)
            for (std::uint32_t& sum : sums[n]) sum = static_cast<std::uint32_t>(offset_of<format>(x, row + n));
        for (int k = 0; k < w.columns; k += kColumnsOfWord, at += 4 * kLanes) {
            std::int16_t weights[kColumnsOfWord][kLanes];
            unpack(at, weights);
            for (int n = 0; n < rows; ++n) add(weights, codes + n * x.stride + k, sums[n]);
        }
        for (int n = 0; n < rows; ++n) write_outputs(load<Ints>(sums[n]), x, row + n, w, panel, y + n * y_stride);
    }
};

template <Format format>
void integer_format(const CodeRows& x, const Panels& w, int first_panel, int count, float* y, std::size_t y_stride) {
    const int done = cover<IntegerTiles<format>, 4, 1>(x, 0, w, first_panel, count, y, y_stride);
    cover<IntegerTiles<format>, 1, 1>(x, done, w, first_panel, count, y, y_stride);
}

void integer_product(const CodeRows& x, const Panels& w, int first_panel, int count, float* y, std::size_t y_stride) {
    if (w.format == Format::kInt4) return integer_format<Format::kInt4>(x, w, first_panel, count, y, y_stride);
    integer_format<Format::kInt8>(x, w, first_panel, count, y, y_stride);
}

std::int64_t peak_dots(int rounds) {
    constexpr int chains = 8;
    typedef std::int16_t Shorts __attribute__((vector_size(16)));
    repeat_dots<chains, Shorts, Shorts, Shorts>(rounds,
                                                [](auto& sum, auto weights, auto inputs) { sum += weights * inputs; });
    return std::int64_t{8} * chains * rounds;
}

}  // namespace

extern const Kernel kPortableKernel;
const Kernel kPortableKernel = {"portable",     integer_product, float_product, rms_norm, quantize_static,
                                quantize_token, swiglu,          add,           hadamard, rotate,
                                write_kv,       attend,          argmax,        peak_dots};

}  // namespace osp
