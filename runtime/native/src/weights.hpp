// The parameters of a Llama, as the engine holds them.
#pragma once

#include <array>
#include <vector>

#include "hadamard.hpp"
#include "packed_matrix.hpp"

namespace osp {

struct Shape {
    int vocabulary, width, inner, layers, heads, kv_heads, head_dim;
    float norm_eps;

    int queries() const { return heads * head_dim; }
    int keys() const { return kv_heads * head_dim; }
};

enum class Site { kQ, kK, kV, kO, kGate, kUp, kDown };
constexpr int kSites = 7;

// A linear layer without bias.
struct Linear {
    PackedMatrix matrix;
    int input_bits = 16;     // 16: the input is not quantized
    bool per_token = false;  // the input's scale: each token's own, or `input_scale`
    float input_scale = 1;
    bool rotated = false;  // the input passes the FFN Hadamard transform first (down only)
};

struct Block {
    std::array<Linear, kSites> linears;
    std::vector<float> attention_norm, ffn_norm;

    const Linear& at(Site site) const { return linears[static_cast<std::size_t>(site)]; }
};

struct Weights {
    std::vector<Block> blocks;
    PackedMatrix embedding;  // empty where it is tied: the head's matrix then
    Linear head;
    std::vector<float> final_norm;
    std::vector<float> rotary_frequencies;  // [head_dim / 2]
    Hadamard ffn, queries_and_keys;

    const PackedMatrix& table() const { return embedding.rows() > 0 ? embedding : head.matrix; }
};

}  // namespace osp
