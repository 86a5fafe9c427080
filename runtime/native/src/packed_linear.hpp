// One linear layer by itself, for engines that are not ours: from rows of floats to rows of floats, its inputs
// transformed and quantized on the way, bit for bit `quant.arithmetic.quantized_linear`.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "hadamard.hpp"
#include "kernel.hpp"
#include "packed_matrix.hpp"
#include "team.hpp"

namespace osp {

enum class Number : std::uint8_t { kFloat32, kBfloat16 };

// What becomes of a layer's inputs.
struct InputScheme {
    int bits = 16;               // 4 or 8; 16: they stay floats
    std::optional<float> scale;  // static; none: each row's own
    Hadamard hadamard;           // that each row passes first
};

class PackedLinear {
  public:
    // Throws std::invalid_argument where the parts do not fit: bits, scale, or the transform's width.
    PackedLinear(std::shared_ptr<Team> team, const Kernel& kernel, PackedMatrix matrix, InputScheme inputs);

    const PackedMatrix& matrix() const { return matrix_; }
    const Kernel& kernel() const { return kernel_; }

    // y [rows, M] of x [rows, K]. Several threads may call at once; they come in turns.
    void forward(const void* x, Number x_type, int rows, void* y, Number y_type) const;
    // The same from codes [rows, K], within the inputs' bits, and the scale of each row; a NaN makes its row NaN.
    // Throws std::invalid_argument where inputs are not quantized.
    void multiply(const std::int8_t* codes, const float* scales, int rows, void* y, Number y_type) const;

  private:
    struct Prepared;  // rows as the kernel takes them
    Prepared prepared(int rows) const;
    Phase prepare(const void* x, Number type, const Prepared& rows) const;
    Phase prepare(const std::int8_t* codes, const float* scales, const Prepared& rows) const;
    Phase product(const Prepared& rows, void* y, Number type) const;
    std::size_t scratch_bytes(int rows) const;

    std::shared_ptr<Team> team_;
    const Kernel& kernel_;
    PackedMatrix matrix_;
    InputScheme inputs_;
};

}  // namespace osp
