// The Hadamard transform of one width, as kernels take it.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel.hpp"

namespace osp {

class Hadamard {
  public:
    Hadamard() = default;  // none
    // `signs`: [base][base] of +1 and -1. Throws std::invalid_argument unless the base is 1 or a multiple of 4.
    Hadamard(int blocks, int base, int power, const std::int8_t* signs);

    explicit operator bool() const { return base_ > 0; }
    int width() const { return blocks_ * base_ * power_; }
    HadamardPlan plan() const;

  private:
    int blocks_ = 0, base_ = 0, power_ = 0;
    std::vector<std::uint8_t> combinations_;
};

}  // namespace osp
