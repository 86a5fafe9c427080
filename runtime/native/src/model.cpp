#include "model.hpp"

#include <stdexcept>
#include <string>

#include "step.hpp"

namespace osp {
namespace {

std::invalid_argument wrong(const std::string& what) { return std::invalid_argument(what); }

const Shape& checked(const Shape& s) {
    const auto positive = [](int value, const char* name) {
        if (value < 1) throw wrong(std::string(name) + " must be positive, is " + std::to_string(value));
    };
    positive(s.vocabulary, "vocabulary"), positive(s.width, "width"), positive(s.inner, "inner width");
    positive(s.layers, "layers"), positive(s.heads, "heads"), positive(s.kv_heads, "KV heads");
    positive(s.head_dim, "head width");
    if (s.heads % s.kv_heads != 0) throw wrong("query heads cannot share the KV heads evenly");
    if (s.head_dim % 2 != 0) throw wrong("the head width is odd");
    return s;
}

void check_linear(const Linear& linear, const std::string& name, int rows, int columns) {
    if (linear.matrix.rows() != rows || linear.matrix.columns() != columns)
        throw wrong(name + " is " + std::to_string(linear.matrix.rows()) + " x " +
                    std::to_string(linear.matrix.columns()) + ", not " + std::to_string(rows) + " x " +
                    std::to_string(columns) + (linear.matrix.rows() == 0 ? ": it was not set" : ""));
    const bool integers = linear.matrix.format() == Format::kInt4 || linear.matrix.format() == Format::kInt8;
    if (linear.input_bits < 16 && !integers) throw wrong(name + ": codes cannot meet weights that are floats");
}

void check_norm(const std::vector<float>& weight, const std::string& name, int width) {
    if (weight.size() != static_cast<std::size_t>(width)) throw wrong(name + " was not set, or has another width");
}

}  // namespace

Model::Model(const Shape& shape, int kv_bits, int kv_blocks, int max_positions, int max_rows, int threads,
             const Kernel& kernel)
    : shape_(checked(shape)),
      max_rows_(max_rows),
      max_positions_(max_positions),
      kernel_(kernel),
      cache_(shape.layers, shape.kv_heads, shape.head_dim, kv_bits, kv_blocks),
      pool_(threads, scratch_bytes(shape, max_positions, max_rows)) {
    if (max_rows < 1 || max_positions < 1) throw wrong("a step of no rows, or a context of no positions");
    weights_.blocks.resize(static_cast<std::size_t>(shape.layers));
    activations_ = std::make_unique<Activations>(shape, max_rows);
    const auto rows = static_cast<std::size_t>(max_rows);
    logits_ = Buffer(rows * static_cast<std::size_t>(shape.vocabulary) * sizeof(float));
    argmax_.resize(rows);
}

Model::~Model() { pool_.quiesce(); }

std::size_t Model::weight_bytes() const {
    std::size_t bytes = weights_.embedding.bytes() + weights_.head.matrix.bytes();
    for (const Block& block : weights_.blocks)
        for (const Linear& linear : block.linears) bytes += linear.matrix.bytes();
    return bytes;
}

PackedMatrix Model::pack(Format format, int rows, int columns, std::vector<float> scales, const void* source,
                         std::uint64_t seed) {
    PackedMatrix matrix(format, rows, columns, std::move(scales));
    // Packing is the commit: it happens once for each chunk, so that no two threads write one panel.
    const int panels = matrix.panels(), step = 8;
    const auto commit = [&](int chunk, const std::byte*) {
        for (int panel = chunk * step; panel < std::min(panels, (chunk + 1) * step); ++panel)
            source ? matrix.pack_panel(panel, source) : matrix.randomize_panel(panel, seed);
    };
    pool_.run({{(panels + step - 1) / step, [](int, std::byte*) {}, commit}});
    pool_.quiesce();  // the phase refers to this frame
    return matrix;
}

void Model::check_weights() const {
    const Shape& s = shape_;
    for (std::size_t i = 0; i < weights_.blocks.size(); ++i) {
        const Block& block = weights_.blocks[i];
        const std::string layer = "layer " + std::to_string(i) + " ";
        check_linear(block.at(Site::kQ), layer + "q", s.queries(), s.width);
        check_linear(block.at(Site::kK), layer + "k", s.keys(), s.width);
        check_linear(block.at(Site::kV), layer + "v", s.keys(), s.width);
        check_linear(block.at(Site::kO), layer + "o", s.width, s.queries());
        check_linear(block.at(Site::kGate), layer + "gate", s.inner, s.width);
        check_linear(block.at(Site::kUp), layer + "up", s.inner, s.width);
        check_linear(block.at(Site::kDown), layer + "down", s.width, s.inner);
        check_norm(block.attention_norm, layer + "attention norm", s.width);
        check_norm(block.ffn_norm, layer + "feed-forward norm", s.width);
        if (block.at(Site::kDown).rotated && weights_.ffn.width() != s.inner)
            throw wrong(layer + "down is rotated, but the FFN Hadamard transform was not set for its width");
    }
    check_linear(weights_.head, "head", s.vocabulary, s.width);
    const PackedMatrix& table = weights_.table();
    if (table.rows() != s.vocabulary || table.columns() != s.width) throw wrong("the embedding has another shape");
    check_norm(weights_.final_norm, "final norm", s.width);
    if (weights_.rotary_frequencies.size() != static_cast<std::size_t>(s.head_dim / 2))
        throw wrong("the rotary frequencies were not set");
    if (weights_.queries_and_keys && weights_.queries_and_keys.width() != s.head_dim)
        throw wrong("the Hadamard transform of queries and keys has another width than a head");
}

void Model::step(const Batch& batch) {
    std::size_t rows = 0;
    for (const Slice& slice : batch.slices) {
        if (slice.length < 1 || slice.start < 0 || slice.logits < 0 || slice.logits > slice.length)
            throw wrong("a slice of " + std::to_string(slice.length) + " tokens from position " +
                        std::to_string(slice.start) + " that wants " + std::to_string(slice.logits) + " logits");
        const int positions = slice.start + slice.length;
        if (positions > max_positions_)
            throw wrong("position " + std::to_string(positions - 1) + " lies beyond the context of " +
                        std::to_string(max_positions_));
        if (slice.block_table.size() * kLanes < static_cast<std::size_t>(positions))
            throw wrong("the block table does not cover position " + std::to_string(positions - 1));
        for (std::int32_t block : slice.block_table)
            if (block < 0 || block >= cache_.blocks()) throw wrong("no KV block " + std::to_string(block));
        rows += static_cast<std::size_t>(slice.length);
    }
    if (rows != batch.tokens.size() || rows > static_cast<std::size_t>(max_rows_))
        throw wrong(std::to_string(batch.tokens.size()) + " tokens for slices of " + std::to_string(rows) +
                    ", where a step has at most " + std::to_string(max_rows_));
    for (std::int32_t token : batch.tokens)
        if (token < 0 || token >= shape_.vocabulary) throw wrong("no token " + std::to_string(token));
    logit_rows_ = 0;
    if (rows == 0) return;
    StepBuilder builder(*this, batch);
    const int wanted = builder.logit_rows();
    pool_.run(builder.build());
    logit_rows_ = wanted;
}

void Model::copy_block(int source, int target) {
    if (source < 0 || source >= cache_.blocks() || target < 0 || target >= cache_.blocks())
        throw wrong("no KV block " + std::to_string(source) + " or " + std::to_string(target));
    cache_.copy(source, target);
}

}  // namespace osp
