// Any processor: no intrinsics, only the compiler's own vectors of the least registers that there are.
#include "../kernel_table.hpp"

namespace osp {
namespace {

typedef std::int16_t NativeShorts __attribute__((vector_size(4 * kNativeLanes)));
using Shorts = Widened<NativeShorts, kLanes>::Type;  // two for each of 16 outputs

// Inputs k and k + 2 for the halves of all 32-bit lanes.
OSP_INLINE Shorts pair(const std::int8_t* x) {
    const auto low = static_cast<std::uint16_t>(x[0]), high = static_cast<std::uint16_t>(x[2]);
    return bits_as<Shorts>(broadcast(low | static_cast<std::uint32_t>(high) << 16));
}

// The sums of both halves of 32-bit lanes, as signed numbers.
OSP_INLINE Words halves_added(Shorts v) {
    const Words both = bits_as<Words>(v);
    return bits_as<Words>(bits_as<Ints>(both << 16) >> 16) + bits_as<Words>(bits_as<Ints>(both) >> 16);
}

// A lane holds one output: its two halves multiply two columns at a time, and 16 bits hold the products.
template <Format format>
struct IntegerTiles {
    static constexpr int kColumnsOfWord = format == Format::kInt4 ? 8 : 4;

    // The codes of columns k and k + 2, one in each half of a lane: of the word shifted to have them lowest.
    static OSP_INLINE Shorts columns(Words word, int shift) {
        return bits_as<Shorts>(word >> shift & broadcast(format == Format::kInt4 ? 0x000f000fu : 0x00ff00ffu));
    }

    template <int rows, int panels>
    static void tile(const CodeRows& x, int row, const Panels& w, int panel, float* y, std::size_t y_stride) {
        static_assert(panels == 1, "two panels have no room in 16 registers");
        const std::int8_t* codes = x.codes + static_cast<std::size_t>(row) * x.stride;
        const std::uint8_t* at = panel_of(w, panel);
        Words sums[rows];  // modulo 2^32
        OSP_UNROLL
        for (int n = 0; n < rows; ++n) sums[n] = broadcast(static_cast<std::uint32_t>(offset_of<format>(x, row + n)));
        for (int k = 0; k < w.columns; k += kColumnsOfWord, at += 4 * kLanes) {
            const Words word = load<Words>(at);
            OSP_UNROLL
            for (int n = 0; n < rows; ++n) {
                const std::int8_t* inputs = codes + n * x.stride + k;
                if constexpr (format == Format::kInt4) {
                    // Low nibbles are columns 0 … 3, high ones 4 … 7; four products of 15 * 128 fit together.
                    const Shorts even = columns(word, 0) * pair(inputs) + columns(word, 4) * pair(inputs + 4);
                    const Shorts odd = columns(word, 8) * pair(inputs + 1) + columns(word, 12) * pair(inputs + 5);
                    sums[n] = sums[n] + halves_added(even + odd);
                } else {
                    const Shorts even = columns(word, 0) * pair(inputs), odd = columns(word, 8) * pair(inputs + 1);
                    sums[n] = sums[n] + (halves_added(even) + halves_added(odd));
                }
            }
        }
        OSP_UNROLL
        for (int n = 0; n < rows; ++n) write_outputs(bits_as<Ints>(sums[n]), x, row + n, w, panel, y + n * y_stride);
    }
};

std::int64_t peak_dots(int rounds) {
    constexpr int chains = 8;
    repeat_dots<chains, NativeShorts, NativeShorts, NativeShorts>(
        rounds, [](auto& sum, auto weights, auto inputs) { sum += weights * inputs; });
    return std::int64_t{2 * kNativeLanes} * chains * rounds;
}

}  // namespace

extern const Kernel kPortableKernel;
const Kernel kPortableKernel =
    kernel_table("portable", integer_product<IntegerTiles, Size<2, 1>, Size<1, 1>>, peak_dots);

}  // namespace osp
