// Matrix products of all kernels: those of integers against exact sums, those of floats against a scalar chain of
// multiply-adds, bit for bit, for every number of rows and every way to cut the panels.
#include "avxvnni_in_evex.hpp"
#include "kernel_cases.hpp"
#include "packed_matrix.hpp"

namespace kernel_test {
namespace {

std::vector<const Kernel*> tested_kernels() {
    std::vector<const Kernel*> kernels = available_kernels();
#if defined(OSP_AVXVNNI_IN_EVEX)
    if (std::strcmp(kernels.front()->name, "avx512-vnni") == 0) kernels.push_back(&kAvxVnniKernelInEvex);
#endif
    return kernels;
}

enum class Fill { kRandom, kLowest, kHighest, kOpposite };

int lowest_code(int bits) { return bits == 4 ? -8 : -128; }
int highest_code(int bits) { return bits == 4 ? 7 : 127; }

int code(Random& random, Fill fill, int bits, bool of_weights) {
    if (fill == Fill::kRandom) return random.integer(lowest_code(bits), highest_code(bits));
    const bool low = fill == Fill::kLowest || (fill == Fill::kOpposite && of_weights);
    return low ? lowest_code(bits) : highest_code(bits);
}

struct Weights {
    int outputs, columns, bits;
    std::vector<int> codes;  // [outputs, columns]
    std::vector<float> scales;
    PackedMatrix matrix;
    Exact<std::uint8_t> data;  // the same, without anything behind it
    Exact<float> packed_scales;

    Weights(Random& random, Fill fill, int outputs_, int columns_, int bits_, bool per_output)
        : outputs(outputs_),
          columns(columns_),
          bits(bits_),
          codes(static_cast<std::size_t>(outputs) * columns),
          scales(drawn_scales(random, per_output ? outputs : 1)),
          matrix(packed(random, fill)),
          data(matrix.view().data, matrix.panel_bytes() * matrix.panels()),
          packed_scales(matrix.view().scales, scales.size() > 1 ? matrix.panels() * kLanes : 1) {}

    Panels view() const {
        Panels view = matrix.view();
        view.data = data.data();
        view.scales = packed_scales.data();
        return view;
    }
    float scale(int output) const { return scales[scales.size() > 1 ? output : 0]; }

  private:
    static std::vector<float> drawn_scales(Random& random, int count) {
        std::vector<float> scales(count);
        for (float& scale : scales) scale = 0.001f + std::fabs(random.number());
        return scales;
    }
    PackedMatrix packed(Random& random, Fill fill) {
        for (int& c : codes) c = code(random, fill, bits, true);
        const int bytes = bits == 4 ? (columns + 1) / 2 : columns;
        std::vector<std::uint8_t> stored(static_cast<std::size_t>(outputs) * bytes);
        for (int m = 0; m < outputs; ++m)
            for (int k = 0; k < columns; ++k) {
                const int c = codes[static_cast<std::size_t>(m) * columns + k];
                std::uint8_t& byte = stored[static_cast<std::size_t>(m) * bytes + (bits == 4 ? k / 2 : k)];
                byte = static_cast<std::uint8_t>(bits == 8 ? c : k % 2 == 0 ? c & 15 : byte | (c & 15) << 4);
            }
        PackedMatrix made(bits == 4 ? Format::kInt4 : Format::kInt8, outputs, columns, scales);
        for (int panel = 0; panel < made.panels(); ++panel) made.pack_panel(panel, stored.data());
        return made;
    }
};

struct Inputs {
    int rows;
    std::size_t stride;
    Exact<std::int8_t> codes;
    Exact<std::int32_t> sums;
    Exact<float> scales;

    Inputs(Random& random, Fill fill, int rows_, int columns, int bits)
        : rows(rows_),
          stride(static_cast<std::size_t>((columns + kColumnStep - 1) / kColumnStep * kColumnStep)),
          codes(rows * stride),
          sums(rows),
          scales(rows) {
        for (int n = 0; n < rows; ++n) {
            for (int k = 0; k < columns; ++k) {
                codes[n * stride + k] = static_cast<std::int8_t>(code(random, fill, bits, false));
                sums[n] += codes[n * stride + k];
            }
            scales[n] = n % 7 == 3 ? kNan : std::fabs(random.number());
        }
    }
    CodeRows first(int count) const { return {count, stride, codes.data(), sums.data(), scales.data()}; }
};

// [rows, outputs]
std::vector<float> exact_product(const Inputs& x, const Weights& w) {
    std::vector<float> y(static_cast<std::size_t>(x.rows) * w.outputs);
    for (int n = 0; n < x.rows; ++n)
        for (int m = 0; m < w.outputs; ++m) {
            const std::int8_t* row = x.codes.data() + n * x.stride;
            const int* weights = w.codes.data() + static_cast<std::size_t>(m) * w.columns;
            std::int64_t sum = 0;
            for (int k = 0; k < w.columns; ++k) sum += row[k] * weights[k];
            y[static_cast<std::size_t>(n) * w.outputs + m] = static_cast<float>(sum) * (x.scales[n] * w.scale(m));
        }
    return y;
}

constexpr float kUntouched = -12345.0f;

// Compares panels `first` … `first + count - 1` of `rows` rows with [rows, outputs], and what is between the rows.
template <typename Product>
void check_panels(const Kernel& kernel, int rows, int outputs, int first, int count, const std::vector<float>& expected,
                  Product product) {
    const std::size_t width = static_cast<std::size_t>(count) * kLanes, stride = width + 3;
    Exact<float> y(rows > 0 ? (rows - 1) * stride + width : 0, kUntouched);
    product(y.data(), stride);
    for (int n = 0; n < rows; ++n) {
        const float* row = y.data() + n * stride;
        for (std::size_t i = 0; i < width; ++i) {
            const int m = first * kLanes + static_cast<int>(i);
            if (m >= outputs) continue;
            const float right = expected[static_cast<std::size_t>(n) * outputs + m];
            CHECK(same(row[i], right), "%s: %d rows, row %d, output %d of %d, panels %d + %d: %.9g, not %.9g",
                  kernel.name, rows, n, m, outputs, first, count, row[i], right);
        }
        for (std::size_t i = width; n + 1 < rows && i < stride; ++i)
            CHECK(row[i] == kUntouched, "%s: writes beyond the outputs of row %d", kernel.name, n);
    }
}

template <typename Product>
void check_cuts(const Kernel& kernel, int rows, int outputs, const std::vector<float>& expected, Product product) {
    const int panels = (outputs + kLanes - 1) / kLanes;
    for (int first = 0; first < panels; ++first)
        for (int count = 1; first + count <= panels; ++count)
            check_panels(kernel, rows, outputs, first, count, expected,
                         [&](float* y, std::size_t stride) { product(first, count, y, stride); });
}

void check_integers(Fill fill, int most_rows, int step, int outputs, int columns, int bits, int input_bits,
                    bool per_output) {
    Random random(static_cast<unsigned>(columns * 64 + outputs));
    const Weights w(random, fill, outputs, columns, bits, per_output);
    const Inputs x(random, fill, most_rows, columns, input_bits);
    const std::vector<float> expected = exact_product(x, w);
    for (const Kernel* kernel : tested_kernels())
        for (int rows = most_rows; rows >= 0; rows -= step)
            check_cuts(*kernel, rows, outputs, expected, [&](int first, int count, float* y, std::size_t stride) {
                kernel->integer_product(x.first(rows), w.view(), first, count, y, stride);
            });
}

struct FloatWeights {
    std::vector<float> values;  // [outputs, columns], what the format holds
    PackedMatrix matrix;
};

FloatWeights float_weights(Random& random, Format format, int outputs, int columns) {
    FloatWeights w = {std::vector<float>(static_cast<std::size_t>(outputs) * columns),
                      PackedMatrix(format, outputs, columns, {})};
    random.numbers(w.values.data(), w.values.size());
    w.values[w.values.size() / 2] = 0x1p-130f;  // a denormal number
    std::vector<std::uint16_t> halves;
    for (float& value : w.values) {
        halves.push_back(to_bfloat16(value));
        if (format == Format::kBfloat16) value = from_bfloat16(halves.back());
    }
    const void* stored = format == Format::kBfloat16 ? static_cast<const void*>(halves.data()) : w.values.data();
    for (int panel = 0; panel < w.matrix.panels(); ++panel) w.matrix.pack_panel(panel, stored);
    return w;
}

// The order that kernel.hpp promises: one chain over k, the scale last.
float chain(bool fused, const float* x, const float* weights, int columns, float scale) {
    float sum = 0;
    for (int k = 0; k < columns; ++k) {
        const volatile float product = weights[k] * x[k];  // rounded by itself
        sum = fused ? std::fma(weights[k], x[k], sum) : sum + product;
    }
    return sum * scale;
}

void check_floats(Format format, int most_rows, int step, int outputs, int columns) {
    Random random(static_cast<unsigned>(columns * 64 + outputs));
    const bool integers = format == Format::kInt4 || format == Format::kInt8;
    const Weights codes(random, Fill::kRandom, outputs, columns, format == Format::kInt4 ? 4 : 8, outputs % 2 == 1);
    FloatWeights floats = float_weights(random, integers ? Format::kFloat32 : format, outputs, columns);
    if (integers) floats.values.assign(codes.codes.begin(), codes.codes.end());
    const Exact<std::uint8_t> data(floats.matrix.view().data, floats.matrix.panel_bytes() * floats.matrix.panels());
    Panels view = integers ? codes.view() : floats.matrix.view();
    if (!integers) view.data = data.data();

    const std::size_t stride = static_cast<std::size_t>(view.columns);
    Exact<float> x(most_rows * stride);
    for (int n = 0; n < most_rows; ++n) random.numbers(&x[n * stride], columns, n % 5 == 4 ? 1e38f : 1);
    x[stride * (most_rows / 2)] = kNan;
    x[stride * (most_rows / 3) + columns - 1] = -kInfinity;

    for (const Kernel* kernel : tested_kernels()) {
        std::vector<float> expected(static_cast<std::size_t>(most_rows) * outputs);
        for (int n = 0; n < most_rows; ++n)
            for (int m = 0; m < outputs; ++m)
                expected[static_cast<std::size_t>(n) * outputs + m] =
                    chain(is_fused(*kernel), &x[n * stride], &floats.values[static_cast<std::size_t>(m) * columns],
                          columns, integers ? codes.scale(m) : 1);
        for (int rows = most_rows; rows >= 0; rows -= step)
            check_cuts(*kernel, rows, outputs, expected, [&](int first, int count, float* y, std::size_t y_stride) {
                kernel->float_product({rows, stride, x.data()}, view, first, count, y, y_stride);
            });
    }
}

}  // namespace
}  // namespace kernel_test

int main() {
    using kernel_test::Fill, osp::Format;
    for (int bits : {4, 8})
        for (int input_bits : {4, 8}) {
            // Every number of rows once, and few of them for the other widths.
            kernel_test::check_integers(Fill::kRandom, 40, 1, 17, 9, bits, input_bits, true);
            for (int columns : {1, 7, 8, 63})
                kernel_test::check_integers(Fill::kRandom, 13, 4, columns == 8 ? 15 : 1, columns, bits, input_bits,
                                            false);
            for (Fill fill : {Fill::kLowest, Fill::kHighest, Fill::kOpposite})
                kernel_test::check_integers(fill, 13, 3, 16, 63, bits, input_bits, false);
            kernel_test::check_integers(Fill::kRandom, 33, 16, 49, 640, bits, input_bits, true);
            kernel_test::check_integers(Fill::kLowest, 14, 13, 17, 5504, bits, input_bits, false);
        }
    // The longest sum that 32 bits hold: quant.arithmetic.MAX_REDUCTION.
    for (Fill fill : {Fill::kLowest, Fill::kOpposite}) kernel_test::check_integers(fill, 1, 1, 1, 131'071, 8, 8, false);

    for (Format format : {Format::kInt4, Format::kInt8, Format::kBfloat16, Format::kFloat32}) {
        kernel_test::check_floats(format, 33, 1, 17, 9);
        for (int columns : {1, 7, 8}) kernel_test::check_floats(format, 9, 4, columns % 2 == 0 ? 16 : 17, columns);
        kernel_test::check_floats(format, 17, 5, 65, 63);
        kernel_test::check_floats(format, 9, 8, 17, 640);
    }
    std::puts("products agree");
}
