// A Llama, its KV cache and its threads: `step` computes a batch of slices of sequences (docs/native-engine.md).
#pragma once

#include <memory>
#include <vector>

#include "kv_cache.hpp"
#include "pool.hpp"
#include "weights.hpp"

namespace osp {

// Consecutive tokens of one sequence, `SequenceSlice` of runtime/engine/base.py.
struct Slice {
    int start;  // position of the first token
    int length;
    int logits;                             // wanted for so many of the last tokens
    std::vector<std::int32_t> block_table;  // covers positions 0 … start + length - 1
};

struct Batch {
    std::vector<std::int32_t> tokens;  // of all slices, one after another
    std::vector<Slice> slices;
};

class Model {
  public:
    // `max_rows`: most tokens of a step.
    // Throws std::invalid_argument for what makes no sense, std::bad_alloc.
    Model(const Shape& shape, int kv_bits, int kv_blocks, int max_positions, int max_rows, int threads,
          const Kernel& kernel);
    ~Model();

    const Shape& shape() const { return shape_; }
    const Kernel& kernel() const { return kernel_; }
    int threads() const { return pool_.threads(); }
    int max_rows() const { return max_rows_; }
    const KvCache& cache() const { return cache_; }
    Weights& weights() { return weights_; }
    std::size_t weight_bytes() const;

    // Packs a matrix, on all threads. `source` as `PackedMatrix::pack_panel`; null: random weights of this seed.
    PackedMatrix pack(Format format, int rows, int columns, std::vector<float> scales, const void* source,
                      std::uint64_t seed = 0);

    // Throws std::invalid_argument where a weight was not set or has not the shape that it must have.
    void check_weights() const;

    // Computes the slices. Afterwards `logits` holds a row for each token that wanted one, in the batch's order, and
    // `argmax` each row's likeliest token (-1: no usable maximum); both until the next step.
    // Throws std::invalid_argument where an id or a block is out of range, or there are too many rows.
    void step(const Batch& batch);
    int logit_rows() const { return logit_rows_; }
    const float* logits() const { return logits_.as<float>(); }
    const std::int32_t* argmax() const { return argmax_.data(); }

    void copy_block(int source, int target);

  private:
    friend class StepBuilder;
    struct Activations;

    Shape shape_;
    int max_rows_, max_positions_;
    const Kernel& kernel_;
    Weights weights_;
    KvCache cache_;
    std::unique_ptr<Activations> activations_;
    Buffer logits_;
    std::vector<std::int32_t> argmax_;
    int logit_rows_ = 0;
    Pool pool_;  // last: its threads end before what they use is freed
};

}  // namespace osp
