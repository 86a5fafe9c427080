// The Python classes `Team` and `PackedLinear`: single layers for other engines, on those engines' threads. Arrays are
// whatever speaks DLPack: numpy's, or torch's in bfloat16. A call that computes lets go of the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "kernels.hpp"
#include "packed_linear.hpp"
#include "stored_codes.hpp"
#include "torch_operators.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace osp {
namespace {

using Rows = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Target = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using RowCodes = nb::ndarray<const std::int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Signs = nb::ndarray<const std::int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

Number number_of(nb::dlpack::dtype type) {
    if (type == nb::dtype<float>()) return Number::kFloat32;
    require(type.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat) && type.bits == 16,
            "rows are float32 or bfloat16");
    return Number::kBfloat16;
}

int rows_of(const PackedLinear& linear, std::size_t rows, std::size_t columns, const Target& y) {
    require(columns == static_cast<std::size_t>(linear.matrix().columns()),
            "the rows have other columns than the weights");
    require(y.shape(0) == rows && y.shape(1) == static_cast<std::size_t>(linear.matrix().rows()),
            "the outputs are not [rows, outputs of the layer]");
    return extent(rows);
}

void forward(const PackedLinear& linear, const Rows& x, const Target& y) {
    const int rows = rows_of(linear, x.shape(0), x.shape(1), y);
    const Number from = number_of(x.dtype()), to = number_of(y.dtype());
    const nb::gil_scoped_release release;
    linear.forward(x.data(), from, rows, y.data(), to);
}

void multiply(const PackedLinear& linear, const RowCodes& codes, const CodeScales& scales, const Target& y) {
    const int rows = rows_of(linear, codes.shape(0), codes.shape(1), y);
    require(scales.size() == codes.shape(0), "there is not a scale for each row");
    const Number to = number_of(y.dtype());
    const nb::gil_scoped_release release;
    linear.multiply(codes.data(), scales.data(), rows, y.data(), to);
}

// What a layer is to `torch_operators`: its address, in an array that keeps it alive.
auto handle_of(nb::pointer_and_handle<PackedLinear> linear) {
    struct Address {
        std::int64_t value;
        nb::object owner;
    };
    auto* address = new Address{reinterpret_cast<std::int64_t>(linear.p), nb::borrow(linear.h)};
    const nb::capsule keeper(address, [](void* at) noexcept { delete static_cast<Address*>(at); });
    return nb::ndarray<nb::numpy, std::int64_t, nb::ndim<1>>(&address->value, {1}, keeper);
}

Hadamard hadamard_of(int blocks, int power, const std::optional<Signs>& signs) {
    if (!signs) return {};
    require(signs->shape(0) == signs->shape(1), "the signs of a Hadamard transform are [base, base]");
    return {blocks, extent(signs->shape(0)), power, signs->data()};
}

}  // namespace

void bind_linears(nb::module_& module) {
    nb::class_<Team>(module, "Team")
        .def(
            "__init__",
            [](Team* self, int threads, std::uintptr_t parallel) {
                new (self) Team(threads, reinterpret_cast<Team::Parallel>(parallel));
            },
            "threads"_a, "parallel"_a = 0)
        .def_prop_ro("threads", &Team::threads);
    nb::class_<PackedLinear>(module, "PackedLinear")
        .def(
            "__init__",
            [](PackedLinear* self, std::shared_ptr<Team> team, StoredCodes stored, int columns, int bits,
               CodeScales scale, int input_bits, std::optional<float> input_scale, int blocks, int power,
               std::optional<Signs> signs, const std::string& kernel) {
                new (self)
                    PackedLinear(std::move(team), find_kernel(kernel), packed_codes(stored, columns, bits, scale),
                                 {input_bits, input_scale, hadamard_of(blocks, power, signs)});
            },
            "team"_a, "stored"_a, "columns"_a, "bits"_a, "scale"_a, nb::kw_only(), "input_bits"_a,
            "input_scale"_a.none() = nb::none(), "blocks"_a = 1, "power"_a = 1, "signs"_a.none() = nb::none(),
            "kernel"_a = "")
        .def("forward", &forward, "x"_a, "y"_a)
        .def("multiply", &multiply, "codes"_a, "scales"_a, "y"_a)
        .def("handle", &handle_of)
        .def_prop_ro("kernel", [](const PackedLinear& linear) { return std::string(linear.kernel().name); })
        .def_prop_ro("weight_bytes", [](const PackedLinear& linear) { return linear.matrix().bytes(); });
    module.def("implement_torch_operators", &implement_torch_operators, "address_of"_a);
}

}  // namespace osp
