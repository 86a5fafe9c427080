// The Python module `_osp` (its types: runtime/native/_osp.pyi). Sizes are checked here and in `Model`; a call that
// computes lets go of the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "kernels.hpp"
#include "model.hpp"
#include "product_timer.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace osp {

void bind_kernels(nb::module_& module);
void bind_linears(nb::module_& module);

namespace {

using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Signs = nb::ndarray<const std::int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

Format format_of(const std::string& name) {
    if (name == "int4") return Format::kInt4;
    if (name == "int8") return Format::kInt8;
    if (name == "bfloat16") return Format::kBfloat16;
    if (name == "float32") return Format::kFloat32;
    throw std::invalid_argument("no format " + name + "; there are int4, int8, bfloat16 and float32");
}

Linear& linear_of(Model& model, int layer, const std::string& site) {
    static const char* const names[kSites] = {"q", "k", "v", "o", "gate", "up", "down"};
    Weights& weights = model.weights();
    if (site == "head") return weights.head;
    if (layer < 0 || layer >= model.shape().layers) throw std::invalid_argument("no layer " + std::to_string(layer));
    for (std::size_t i = 0; i < kSites; ++i)
        if (site == names[i]) return weights.blocks[static_cast<std::size_t>(layer)].linears[i];
    throw std::invalid_argument("no site " + site);
}

std::vector<float> floats_of(const std::optional<Vector>& values) {
    if (!values) return {};
    return {values->data(), values->data() + values->size()};
}

// A matrix as a checkpoint stores it; `columns` is K, of which 4-bit rows hold two in a byte. None: random weights.
PackedMatrix pack(Model& model, const std::string& name, int rows, int columns, const std::optional<Vector>& scales,
                  const std::optional<Array>& values, std::uint64_t seed) {
    const Format format = format_of(name);
    if (values) {
        const std::size_t size = format == Format::kFloat32 ? 4 : format == Format::kBfloat16 ? 2 : 1;
        const int stored = format == Format::kInt4 ? columns / 2 + columns % 2 : columns;
        if (rows < 1 || columns < 1 || values->ndim() != 2 || values->itemsize() != size ||
            values->shape(0) != static_cast<std::size_t>(rows) || values->shape(1) != static_cast<std::size_t>(stored))
            throw std::invalid_argument("the array does not hold " + std::to_string(rows) + " x " +
                                        std::to_string(columns) + " values of format " + name);
    }
    std::vector<float> row_scales = floats_of(scales);
    const nb::gil_scoped_release release;
    return model.pack(format, rows, columns, std::move(row_scales), values ? values->data() : nullptr, seed);
}

Hadamard hadamard_of(int blocks, int base, int power, Signs signs) {
    if (base < 1 || signs.shape(0) != static_cast<std::size_t>(base) ||
        signs.shape(1) != static_cast<std::size_t>(base))
        throw std::invalid_argument("a Hadamard transform with other signs than its base has");
    return {blocks, base, power, signs.data()};
}

Batch batch_of(const Indices& tokens, const Indices& starts, const Indices& lengths, const Indices& logits,
               const Indices& tables, const Indices& table_sizes) {
    const std::size_t count = starts.size();
    if (lengths.size() != count || logits.size() != count || table_sizes.size() != count)
        throw std::invalid_argument("starts, lengths, logits and table_sizes must have one entry a slice");
    Batch batch;
    batch.tokens.assign(tokens.data(), tokens.data() + tokens.size());
    std::size_t at = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const std::int32_t size = table_sizes.data()[i];
        if (size < 0 || at + static_cast<std::size_t>(size) > tables.size())
            throw std::invalid_argument("the block tables are shorter than table_sizes says");
        const std::int32_t* table = tables.data() + at;
        batch.slices.push_back({starts.data()[i], lengths.data()[i], logits.data()[i], {table, table + size}});
        at += static_cast<std::size_t>(size);
    }
    return batch;
}

void bind_model(nb::module_& module) {
    nb::class_<Model>(module, "Model")
        .def(
            "__init__",
            [](Model* self, int vocabulary, int width, int inner, int layers, int heads, int kv_heads, int head_dim,
               float norm_eps, int kv_bits, int kv_blocks, int max_positions, int max_rows, int threads,
               const std::string& kernel) {
                const Shape shape = {vocabulary, width, inner, layers, heads, kv_heads, head_dim, norm_eps};
                const Kernel& chosen = find_kernel(kernel);
                new (self) Model(shape, kv_bits, kv_blocks, max_positions, max_rows,
                                 threads > 0 ? threads : available_threads(), chosen);
            },
            nb::kw_only(), "vocabulary"_a, "width"_a, "inner"_a, "layers"_a, "heads"_a, "kv_heads"_a, "head_dim"_a,
            "norm_eps"_a, "kv_bits"_a, "kv_blocks"_a, "max_positions"_a, "max_rows"_a, "threads"_a = 0, "kernel"_a = "")
        .def(
            "set_linear",
            [](Model& model, int layer, const std::string& site, const std::string& format, int rows, int columns,
               std::optional<Array> values, std::optional<Vector> scales, int input_bits,
               std::optional<float> input_scale, bool rotated, std::uint64_t seed) {
                Linear& linear = linear_of(model, layer, site);
                linear.matrix = pack(model, format, rows, columns, scales, values, seed);
                if (input_bits != 4 && input_bits != 8 && input_bits != 16)
                    throw std::invalid_argument("inputs have 4, 8 or 16 bits, not " + std::to_string(input_bits));
                linear.input_bits = input_bits;
                linear.per_token = !input_scale;
                linear.input_scale = input_scale.value_or(1.0f);
                linear.rotated = rotated;
            },
            nb::kw_only(), "layer"_a, "site"_a, "format"_a, "rows"_a, "columns"_a, "values"_a.none() = nb::none(),
            "scales"_a.none() = nb::none(), "input_bits"_a = 16, "input_scale"_a.none() = nb::none(),
            "rotated"_a = false, "seed"_a = 0)
        .def(
            "set_embedding",
            [](Model& model, const std::string& format, std::optional<Array> values, std::optional<Vector> scales,
               std::uint64_t seed) {
                const Shape& shape = model.shape();
                model.weights().embedding = pack(model, format, shape.vocabulary, shape.width, scales, values, seed);
            },
            nb::kw_only(), "format"_a, "values"_a.none() = nb::none(), "scales"_a.none() = nb::none(), "seed"_a = 0)
        .def(
            "set_norms",
            [](Model& model, int layer, Vector attention, Vector ffn) {
                if (layer < 0 || layer >= model.shape().layers)
                    throw std::invalid_argument("no layer " + std::to_string(layer));
                Block& block = model.weights().blocks[static_cast<std::size_t>(layer)];
                block.attention_norm = floats_of(attention);
                block.ffn_norm = floats_of(ffn);
            },
            "layer"_a, "attention"_a, "ffn"_a)
        .def("set_final_norm", [](Model& model, Vector norm) { model.weights().final_norm = floats_of(norm); })
        .def("set_rotary_frequencies",
             [](Model& model, Vector frequencies) { model.weights().rotary_frequencies = floats_of(frequencies); })
        .def(
            "set_ffn_hadamard",
            [](Model& model, int blocks, int base, int power, Signs signs) {
                model.weights().ffn = hadamard_of(blocks, base, power, signs);
            },
            "blocks"_a, "base"_a, "power"_a, "signs"_a)
        .def(
            "set_head_hadamard",
            [](Model& model, int blocks, int base, int power, Signs signs) {
                model.weights().queries_and_keys = hadamard_of(blocks, base, power, signs);
            },
            "blocks"_a, "base"_a, "power"_a, "signs"_a)
        .def("check_weights", &Model::check_weights)
        .def(
            "step",
            [](Model& model, Indices tokens, Indices starts, Indices lengths, Indices logits, Indices tables,
               Indices table_sizes) {
                const Batch batch = batch_of(tokens, starts, lengths, logits, tables, table_sizes);
                const nb::gil_scoped_release release;
                model.step(batch);
                return model.logit_rows();
            },
            "tokens"_a, "starts"_a, "lengths"_a, "logits"_a, "tables"_a, "table_sizes"_a)
        .def(
            "logits",
            [](Model& model) {
                const auto rows = static_cast<std::size_t>(model.logit_rows());
                const auto width = static_cast<std::size_t>(model.shape().vocabulary);
                return nb::ndarray<nb::numpy, const float, nb::ndim<2>>(model.logits(), {rows, width}, nb::handle());
            },
            nb::rv_policy::reference_internal)
        .def("argmax",
             [](Model& model) { return std::vector<int>(model.argmax(), model.argmax() + model.logit_rows()); })
        .def("copy_block", &Model::copy_block, "source"_a, "target"_a)
        .def_prop_ro("kernel", [](const Model& model) { return std::string(model.kernel().name); })
        .def_prop_ro("threads", &Model::threads)
        .def_prop_ro("max_rows", &Model::max_rows)
        .def_prop_ro("weight_bytes", &Model::weight_bytes)
        .def_prop_ro("kv_bytes", [](const Model& model) { return model.cache().bytes(); });
}

}  // namespace
}  // namespace osp

NB_MODULE(_osp, module) {
    // Processes that end with a model in place, as vLLM's workers do, lose nothing by it.
    nb::set_leak_warnings(false);
    module.attr("BLOCK_SIZE") = osp::kLanes;
    module.def("available_threads", &osp::available_threads);
    module.def(
        "kv_block_bytes",
        [](int layers, int heads, int channels, int bits) {
            return osp::KvCache(layers, heads, channels, bits, 1).bytes();
        },
        "layers"_a, "heads"_a, "channels"_a, "bits"_a);
    module.def(
        "time_product",
        [](const std::string& kernel, const std::string& format, int rows, int outputs, int columns, int threads,
           double seconds) {
            const osp::Kernel& chosen = osp::find_kernel(kernel);
            const osp::Format layout = osp::format_of(format);
            const nb::gil_scoped_release release;
            return osp::time_product(chosen, layout, rows, outputs, columns, threads, seconds);
        },
        "kernel"_a, "format"_a, "rows"_a, "outputs"_a, "columns"_a, "threads"_a, "seconds"_a);
    osp::bind_model(module);
    osp::bind_kernels(module);
    osp::bind_linears(module);
}
