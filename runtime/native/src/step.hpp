// Builds the program of a step: the phases that a batch passes through, layer by layer.
#pragma once

#include <memory>
#include <vector>

#include "activations.hpp"
#include "model.hpp"

namespace osp {

struct Model::Activations {
    Activations(const Shape& shape, int rows)
        : residual(rows, shape.width),
          queries(rows, shape.queries()),
          keys(rows, shape.keys()),
          values(rows, shape.keys()),
          cosine(rows, shape.head_dim / 2),
          sine(rows, shape.head_dim / 2),
          narrowed(rows, shape.width),
          hidden(rows, shape.width),
          attended(rows, shape.queries()),
          inner(rows, shape.inner) {}

    FloatPlane residual, queries, keys, values, cosine, sine;
    FloatPlane narrowed;  // of the residual stream, the rows that get logits
    InputPlane hidden, attended, inner;
};

constexpr int kRowsOfTile = 4;     // rows that a chunk prepares
constexpr int kTokensOfTile = 16;  // tokens of a slice that a chunk attends for

// Bytes of scratch that a thread needs for any phase of any step of at most `rows` rows.
std::size_t scratch_bytes(const Shape& shape, int max_positions, int rows);

class StepBuilder {
  public:
    // The batch has been checked.
    StepBuilder(Model& model, const Batch& batch);
    std::vector<Phase> build();
    int logit_rows() const { return static_cast<int>(plan_->wanted.size()); }

  private:
    // A run of consecutive panels of a layer.
    struct PanelRun {
        int part, first, count;
    };
    struct Part {
        const Linear* linear;
        const Linear* up;  // of a gate: its partner; the output is swiglu of both
        float* out;
        std::size_t stride;
        bool add;  // to what is there
    };
    // Some tokens of a slice, the KV heads that they attend to, and the row that the first one's outcome becomes.
    struct AttentionTile {
        int slice, row, first, tokens, head, heads, out_row;
    };
    // What phases read; it stays as it is until no thread is in the program any more.
    struct Plan {
        Batch batch;
        std::vector<int> slice_of, position;  // of each row
        std::vector<int> wanted;              // rows that get logits
    };

    void embed();
    void compute_block(int layer);
    void predict();  // logits, and the likeliest token
    // `target` becomes what `readers` take: rows of `source`, normed, transformed, quantized.
    void prepare(const FloatPlane& source, const InputPlane& target, const float* norm, const Hadamard* hadamard,
                 std::vector<const Linear*> readers);
    void multiply(const InputPlane& input, std::vector<Part> parts);
    // From here on, nothing but the rows that get logits; the first of them becomes row 0.
    void narrow();
    void find_argmax();
    // In step_attention.cpp:
    void place(int layer);  // rotary embedding, and into the cache
    void attend(int layer);
    std::vector<AttentionTile> attention_tiles() const;

    static Part part(const Linear& linear, const FloatPlane& out, bool add = false) {
        return {&linear, nullptr, out.row(0), static_cast<std::size_t>(out.stride), add};
    }

    Model& model_;
    const Kernel& kernel_;
    Model::Activations& activations_;
    std::shared_ptr<Plan> plan_;
    std::vector<Phase> phases_;
    int rows_ = 0;  // that are still computed
    const FloatPlane* residual_ = nullptr;
};

}  // namespace osp
