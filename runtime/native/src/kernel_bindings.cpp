// The Python class `Kernel`: one kernel's functions on numpy arrays, each packed and quantized as a step would do it.
// For tests; what serves is `Model`.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include "activations.hpp"
#include "kernels.hpp"
#include "kv_cache.hpp"
#include "limits.hpp"
#include "stored_codes.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace osp {
namespace {

template <typename T, int dimensions>
using Input = nb::ndarray<const T, nb::ndim<dimensions>, nb::c_contig, nb::device::cpu>;
using Floats1 = Input<float, 1>;
using Floats2 = Input<float, 2>;
using Floats3 = Input<float, 3>;
using Stored = StoredCodes;
template <typename T>
using Output = nb::ndarray<nb::numpy, T>;

// A new array, C-contiguous, that Python owns.
template <typename T>
Output<T> array_of(std::initializer_list<std::size_t> shape) {
    std::size_t size = 1;
    for (std::size_t n : shape) size *= n;
    T* data = new T[size]();
    const nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return Output<T>(data, shape, owner);
}

InputPlane plane_of(const Floats2& x) {
    InputPlane plane(extent(x.shape(0)), extent(x.shape(1)));
    for (std::size_t n = 0; n < x.shape(0); ++n)
        std::copy_n(x.data() + n * x.shape(1), x.shape(1), plane.floats.row(static_cast<int>(n)));
    return plane;
}

void quantize(const Kernel& kernel, const InputPlane& plane, int rows, std::optional<float> scale, int bits) {
    require(bits == 4 || bits == 8, "codes have 4 or 8 bits");
    require(!scale || (std::isfinite(*scale) && *scale > 0), "a scale is a positive number");
    const int width = plane.floats.width, stride = plane.floats.stride;
    for (int n = 0; n < rows; ++n) {
        std::int32_t* sum = plane.sums.as<std::int32_t>() + n;
        float* row_scale = plane.scales.as<float>() + n;
        if (scale)
            kernel.quantize_static(plane.floats.row(n), width, stride, *scale, bits, plane.codes_of(n), sum, row_scale);
        else
            kernel.quantize_token(plane.floats.row(n), width, stride, bits, plane.codes_of(n), sum, row_scale);
    }
}

// The outputs of all panels, without those that only fill the last one.
template <typename Product>
Output<float> product(int rows, const PackedMatrix& matrix, Product multiply) {
    const FloatPlane y(rows, matrix.panels() * kLanes);
    if (rows > 0) multiply(y.row(0), static_cast<std::size_t>(y.stride));
    const auto outputs = static_cast<std::size_t>(matrix.rows());
    Output<float> result = array_of<float>({static_cast<std::size_t>(rows), outputs});
    for (int n = 0; n < rows; ++n)
        std::copy_n(y.row(n), outputs, result.data() + static_cast<std::size_t>(n) * outputs);
    return result;
}

Output<float> quantized_linear(const Kernel& kernel, Floats2 x, std::optional<float> input_scale, int input_bits,
                               Stored stored, int columns, int bits, Floats1 scale) {
    require(x.shape(1) == static_cast<std::size_t>(columns), "x has other columns than the weights");
    const PackedMatrix matrix = packed_codes(stored, columns, bits, scale);
    const int rows = extent(x.shape(0));
    const InputPlane plane = plane_of(x);
    quantize(kernel, plane, rows, input_scale, input_bits);
    return product(rows, matrix, [&](float* y, std::size_t stride) {
        kernel.integer_product(plane.code_rows(0, rows), matrix.view(), 0, matrix.panels(), y, stride);
    });
}

Output<float> float_linear(const Kernel& kernel, const Floats2& x, const PackedMatrix& matrix) {
    const int rows = extent(x.shape(0));
    const InputPlane plane = plane_of(x);
    return product(rows, matrix, [&](float* y, std::size_t stride) {
        kernel.float_product(plane.float_rows(0, rows), matrix.view(), 0, matrix.panels(), y, stride);
    });
}

template <typename T>
Output<float> linear(const Kernel& kernel, Floats2 x, Input<T, 2> weight) {
    require(x.shape(1) == weight.shape(1), "x has other columns than the weights");
    const Format format = sizeof(T) == 2 ? Format::kBfloat16 : Format::kFloat32;
    return float_linear(kernel, x, packed(format, weight.data(), weight.shape(0), extent(weight.shape(1)), {}));
}

Output<float> coded_linear(const Kernel& kernel, Floats2 x, Stored stored, int columns, int bits, Floats1 scale) {
    require(x.shape(1) == static_cast<std::size_t>(columns), "x has other columns than the weights");
    return float_linear(kernel, x, packed_codes(stored, columns, bits, scale));
}

using QuantizedRows = std::tuple<Output<std::int8_t>, Output<std::int32_t>, Output<float>>;

QuantizedRows quantized(const Kernel& kernel, Floats2 x, std::optional<float> scale, int bits) {
    const std::size_t rows = x.shape(0), width = x.shape(1);
    const InputPlane plane = plane_of(x);
    quantize(kernel, plane, extent(rows), scale, bits);
    QuantizedRows result = {array_of<std::int8_t>({rows, width}), array_of<std::int32_t>({rows}),
                            array_of<float>({rows})};
    for (std::size_t n = 0; n < rows; ++n)
        std::copy_n(plane.codes_of(static_cast<int>(n)), width, std::get<0>(result).data() + n * width);
    std::copy_n(plane.sums.as<std::int32_t>(), rows, std::get<1>(result).data());
    std::copy_n(plane.scales.as<float>(), rows, std::get<2>(result).data());
    return result;
}

// A copy of x whose rows `change` is called with.
template <typename Change>
Output<float> changed(const Floats2& x, Change change) {
    Output<float> result = array_of<float>({x.shape(0), x.shape(1)});
    std::copy_n(x.data(), x.size(), result.data());
    for (std::size_t n = 0; n < x.shape(0); ++n) change(n, result.data() + n * x.shape(1));
    return result;
}

Output<float> rms_norm(const Kernel& kernel, Floats2 x, Floats1 weight, float eps) {
    require(weight.size() == x.shape(1), "x and weight have different widths");
    return changed(x, [&](std::size_t n, float* y) {
        kernel.rms_norm(x.data() + n * x.shape(1), weight.data(), extent(x.shape(1)), eps, y);
    });
}

Output<float> swiglu(const Kernel& kernel, Floats2 gate, Floats2 up) {
    require(gate.shape(0) == up.shape(0) && gate.shape(1) == up.shape(1), "gate and up have different shapes");
    return changed(gate, [&](std::size_t n, float* y) {
        const std::size_t at = n * gate.shape(1);
        kernel.swiglu(gate.data() + at, up.data() + at, extent(gate.shape(1)), y);
    });
}

Output<float> hadamard(const Kernel& kernel, Floats2 x, int blocks, int base, int power, Input<std::int8_t, 2> signs) {
    require(blocks > 0 && base > 0 && power > 0 && (power & (power - 1)) == 0, "no such transform");
    const auto order = static_cast<std::size_t>(base);
    require(signs.shape(0) == order && signs.shape(1) == order, "signs is not [base, base]");
    const std::size_t count = order * static_cast<std::size_t>(power);
    require(x.shape(1) == count * static_cast<std::size_t>(blocks), "x is not blocks * base * power wide");
    const Hadamard transform(blocks, base, power, signs.data());
    const HadamardPlan plan = transform.plan();
    Buffer scratch(hadamard_scratch(base, power) * sizeof(float));
    return changed(x, [&](std::size_t, float* y) { kernel.hadamard(plan, y, scratch.as<float>()); });
}

Output<float> rotate(const Kernel& kernel, Floats2 x, Floats2 cosine, Floats2 sine) {
    for (const Floats2& table : {cosine, sine})
        require(table.shape(0) == x.shape(0) && 2 * table.shape(1) == x.shape(1), "cosine and sine are not [N, C/2]");
    return changed(x, [&](std::size_t n, float* y) {
        const std::size_t at = n * cosine.shape(1);
        kernel.rotate(y, cosine.data() + at, sine.data() + at, extent(x.shape(1)));
    });
}

using QuantizedHeads = std::tuple<Output<std::uint8_t>, Output<float>, Output<std::uint8_t>>;

// As keys of a tile hold them.
QuantizedHeads quantize_kv(const Kernel& kernel, Floats2 x, int bits) {
    require(bits == 4 || bits == 8, "codes have 4 or 8 bits");
    const std::size_t rows = x.shape(0), channels = x.shape(1);
    const KvCache cache(1, 1, extent(channels), bits, 1);
    const KvLayout& layout = cache.layout();
    std::uint8_t* tile = cache.tiles(0, 0);
    QuantizedHeads result = {array_of<std::uint8_t>({rows, channels}), array_of<float>({rows}),
                             array_of<std::uint8_t>({rows})};
    for (std::size_t n = 0; n < rows; ++n) {
        const std::size_t position = n % kLanes;
        kernel.write_kv(layout, tile, static_cast<int>(position), x.data() + n * channels, x.data() + n * channels);
        for (std::size_t c = 0; c < channels; ++c) {
            const std::size_t half = channels / 2;
            const int byte = tile[(bits == 4 ? c % half : c) * kLanes + position];
            std::get<0>(result).data()[n * channels + c] = static_cast<std::uint8_t>(bits == 8  ? byte
                                                                                     : c < half ? byte & 15
                                                                                                : byte >> 4);
        }
        // A bfloat16 number is the upper half of a float.
        std::memcpy(reinterpret_cast<std::uint8_t*>(std::get<1>(result).data() + n) + 2,
                    tile + layout.key_scales + 2 * position, 2);
        std::get<2>(result).data()[n] = tile[layout.key_zeros + position];
    }
    return result;
}

// The last L of P positions attend to all before them and to themselves, over one KV head's cache.
Output<float> attend(const Kernel& kernel, Floats3 queries, Floats2 keys, Floats2 values, int bits,
                     Input<std::int32_t, 1> block_table) {
    const std::size_t tokens = queries.shape(0), heads = queries.shape(1), channels = queries.shape(2);
    const std::size_t positions = keys.shape(0), blocks = (positions + kLanes - 1) / kLanes;
    require(values.shape(0) == positions && keys.shape(1) == channels && values.shape(1) == channels,
            "queries, keys and values do not fit together");
    require(tokens > 0 && heads > 0 && tokens <= positions, "there are no queries, or more than positions");
    require(block_table.size() == blocks, "the table has no block, or too many, for the positions");
    for (std::size_t b = 0; b < blocks; ++b)
        require(block_table.data()[b] >= 0 && block_table.data()[b] < extent(blocks),
                "the table names a block that is not there");
    const KvCache cache(1, 1, extent(channels), bits, extent(blocks));
    for (std::size_t p = 0; p < positions; ++p)
        kernel.write_kv(cache.layout(), cache.tiles(0, 0) + block_table.data()[p / kLanes] * cache.block_stride(),
                        static_cast<int>(p % kLanes), keys.data() + p * channels, values.data() + p * channels);
    Output<float> out = array_of<float>({tokens, heads, channels});
    const Buffer scratch(attention_scratch(extent(positions)) * sizeof(float));
    kernel.attend({&cache.layout(), cache.tiles(0, 0), cache.block_stride(), block_table.data(), extent(tokens),
                   extent(positions - tokens), extent(heads), queries.data(), out.data(), heads * channels,
                   heads * channels, scratch.as<float>()});
    return out;
}

}  // namespace

void bind_kernels(nb::module_& module) {
    nb::class_<Kernel>(module, "Kernel")
        .def(nb::new_([](const std::string& name) { return const_cast<Kernel*>(&find_kernel(name)); }), "name"_a = "",
             nb::rv_policy::reference)
        .def_prop_ro("name", [](const Kernel& kernel) { return std::string(kernel.name); })
        .def("quantized_linear", &quantized_linear, "x"_a, "input_scale"_a.none(), "input_bits"_a, "stored"_a,
             "columns"_a, "bits"_a, "scale"_a)
        .def("linear", &linear<float>, "x"_a, "weight"_a)
        .def("linear", &linear<std::uint16_t>, "x"_a, "weight"_a)
        .def("coded_linear", &coded_linear, "x"_a, "stored"_a, "columns"_a, "bits"_a, "scale"_a)
        .def("rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a)
        .def("quantize", &quantized, "x"_a, "scale"_a.none(), "bits"_a)
        .def("swiglu", &swiglu, "gate"_a, "up"_a)
        .def("hadamard", &hadamard, "x"_a, "blocks"_a, "base"_a, "power"_a, "signs"_a)
        .def("rotate", &rotate, "x"_a, "cosine"_a, "sine"_a)
        .def(
            "argmax", [](const Kernel& kernel, Floats1 x) { return kernel.argmax(x.data(), extent(x.size())); }, "x"_a)
        .def("quantize_kv", &quantize_kv, "x"_a, "bits"_a)
        .def("attend", &attend, "queries"_a, "keys"_a, "values"_a, "bits"_a, "block_table"_a);

    module.def("available_kernels", [] {
        std::vector<std::string> names;
        for (const Kernel* kernel : available_kernels()) names.emplace_back(kernel->name);
        return names;
    });
    module.def("read_GBps", &read_GBps, "bytes"_a, "threads"_a, "seconds"_a, nb::call_guard<nb::gil_scoped_release>());
    module.def(
        "dot_GOPS", [](int threads, double seconds) { return dot_GOPS(find_kernel(""), threads, seconds); },
        "threads"_a, "seconds"_a, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace osp
