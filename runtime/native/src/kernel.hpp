// What the engine asks of a processor. A kernel is a table of functions, compiled for one instruction set; all kernels
// compute the same: sums of integers exactly, sums of floats in the order that is said here. A row's result does not
// depend on the other rows of a call, nor on how a call's panels are cut into calls.
//
// Letters: N rows (tokens of a step), M outputs, K inputs of a linear layer, C channels of a head, P positions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace osp {

// Outputs of a panel, positions of a KV block, floats of a vector.
constexpr int kLanes = 16;

// Columns of packed integer matrices are padded to a multiple of this with zeros, and so are the rows that they meet.
constexpr int kColumnStep = 8;

// How a matrix [M, K] is packed: panels of 16 outputs (the last one filled up with zeros), each contiguous over k.
//   kInt4      for every 8 k, 64 bytes: byte 4 r + j holds output r, (code + 8) of k + j in its low nibble and of
//              k + 4 + j in its high one
//   kInt8      for every 4 k, 64 bytes: byte 4 r + j holds (code + 128) of output r at k + j
//   kBfloat16  for every k, 16 bfloat16, one an output
//   kFloat32   for every k, 16 float32, one an output
// The codes are biased because the dot products of x86 take unsigned bytes on one side: sum x (w + b) - b sum x.
enum class Format : std::uint8_t { kInt4, kInt8, kBfloat16, kFloat32 };

struct Panels {
    Format format;
    int columns;               // K, padded for integers
    std::size_t panel_bytes;   // from one panel to the next
    const std::uint8_t* data;  // 64-byte aligned
    const float* scales;       // of the codes: [1], or [M] padded to whole panels; null for floats
    bool scale_per_output;
};

// Rows of input codes, int8, [N, stride], zero beyond K.
struct CodeRows {
    int count;
    std::size_t stride;  // bytes, a multiple of kColumnStep
    const std::int8_t* codes;
    const std::int32_t* sums;  // sum of a row's codes
    const float* scales;       // of each row; NaN makes the row NaN
};

struct FloatRows {
    int count;
    std::size_t stride;   // floats
    const float* values;  // [N, K]; read up to the padded K where the format is of integers, zero there
};

// Where the parts of a KV tile lie: one KV head's keys and values of 16 positions, in bytes from its start.
//   keys    16 bits: [C][16] bfloat16; 8: [C][16] codes; 4: [C/2][16] bytes, channel c low and c + C/2 high
//   values  16 bits: [16][C'] bfloat16; 8: [16][C'] codes; 4: [16][C'/2] bytes, channel c low and c + C/2 high;
//           C' is C padded to a multiple of 16 (32 for 4 bits)
//   scales  [16] bfloat16, zeros [16] uint8; of keys and of values (8 and 4 bits)
struct KvLayout {
    int bits;
    int channels;
    int padded_channels;
    std::size_t key_scales, key_zeros, values, value_scales, value_zeros, bytes;
};

// The attention of some consecutive tokens of one sequence over one KV head.
struct Attention {
    const KvLayout* layout;
    const std::uint8_t* tiles;  // of this layer and head: block b's tile is at tiles + b * block_stride
    std::size_t block_stride;
    const std::int32_t* block_table;
    int tokens;  // row i sees positions 0 … first + i
    int first;
    int heads;               // query heads that share the KV head
    const float* queries;    // head h of row i at queries + i * row_stride + h * channels
    float* out;              // likewise
    std::size_t row_stride;  // floats, of queries
    std::size_t out_stride;  // floats, of out
    float* scratch;          // attention_scratch(first + tokens) floats, 64-byte aligned
};

// A Hadamard transform of `blocks * base * power` channels, see quant/hadamard.py.
struct HadamardPlan {
    int blocks, base, power;
    const std::uint8_t*
        combinations;  // [base][base / 4]: bit i of a row's g-th is set where channel 4 g + i is subtracted
    float scale;       // 1 / sqrt(base * power)
};

constexpr int kLargestBase = 512;

// Floats of scratch for the transform: the 16 sums and differences of every four vectors, and the outcome of a block.
constexpr std::size_t hadamard_scratch(int base, int power) {
    return static_cast<std::size_t>(base) * static_cast<std::size_t>(4 * kLanes + power);
}

struct Kernel {
    const char* name;

    // y[n, 16 p + r] = float(sum of codes) * (x.scales[n] * scale), p in [0, panels). x.count is any.
    void (*integer_product)(const CodeRows& x, const Panels& w, int first_panel, int panels, float* y,
                            std::size_t y_stride);
    // y[n, 16 p + r] = (sum over k from first to last, fused multiply-adds) * scale (where the weights are codes).
    void (*float_product)(const FloatRows& x, const Panels& w, int first_panel, int panels, float* y,
                          std::size_t y_stride);

    // y = x / sqrt(mean(x^2) + eps) * weight; the sum in 16 lanes by k mod 16, then the lanes as a tree.
    void (*rms_norm)(const float* x, const float* weight, int width, float eps, float* y);
    // codes = clip(rint(x / scale)), zero up to `padded`. Where x holds a NaN, *row_scale is NaN, else `scale`.
    void (*quantize_static)(const float* x, int width, int padded, float scale, int bits, std::int8_t* codes,
                            std::int32_t* sum, float* row_scale);
    // The same with the row's own scale, absmax / (2^(bits-1) - 1), NaN where x holds a NaN or an infinity.
    void (*quantize_token)(const float* x, int width, int padded, int bits, std::int8_t* codes, std::int32_t* sum,
                           float* row_scale);
    // y = gate / (1 + exp(-gate)) * up
    void (*swiglu)(const float* gate, const float* up, int width, float* y);
    void (*add)(const float* x, int width, float* sum);
    // In place; scratch holds hadamard_scratch(base, power) floats, 64-byte aligned.
    void (*hadamard)(const HadamardPlan& plan, float* x, float* scratch);
    // Rotary embedding of one head in place: channel i turns with i + C/2 by cosine[i], sine[i].
    void (*rotate)(float* head, const float* cosine, const float* sine, int channels);
    // Writes one head's key and value at row `position` of a tile, as `quant.arithmetic.quantize_kv` has it.
    void (*write_kv)(const KvLayout& layout, std::uint8_t* tile, int position, const float* key, const float* value);
    void (*attend)(const Attention& attention);
    // The first index of the largest value; -1 where one is NaN, or where the largest is not finite.
    std::int32_t (*argmax)(const float* x, int width);

    // `rounds` times as many 8-bit dot products in registers as hide their latency: the peak of integer_product.
    // Returns the multiply-adds done.
    std::int64_t (*peak_dots)(int rounds);
};

// Floats of scratch that `attend` takes where the last token sees `positions`: the scores of 8 queries at a time.
constexpr std::size_t attention_scratch(int positions) {
    return 8 * static_cast<std::size_t>((positions + kLanes - 1) / kLanes * kLanes);
}

}  // namespace osp
