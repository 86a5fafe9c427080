#include "hadamard.hpp"

#include <cmath>
#include <stdexcept>
#include <string>

namespace osp {

Hadamard::Hadamard(int blocks, int base, int power, const std::int8_t* signs)
    : blocks_(blocks), base_(base), power_(power) {
    if (blocks < 1 || base < 1 || power < 1 || base > kLargestBase || (base > 1 && base % 4 != 0))
        throw std::invalid_argument("no Hadamard transform of " + std::to_string(blocks) + " x " +
                                    std::to_string(base) + " x " + std::to_string(power) + " channels");
    for (int i = 0; base > 1 && i < base * base; i += 4) {
        int combination = 0;
        for (int bit = 0; bit < 4; ++bit) combination |= (signs[i + bit] < 0 ? 1 : 0) << bit;
        combinations_.push_back(static_cast<std::uint8_t>(combination));
    }
}

HadamardPlan Hadamard::plan() const {
    const double order = static_cast<double>(base_) * power_;
    return {blocks_, base_, power_, combinations_.data(), static_cast<float>(1 / std::sqrt(order))};
}

}  // namespace osp
