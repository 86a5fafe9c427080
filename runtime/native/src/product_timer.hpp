// Times one matrix product by itself, as a step computes it: for `osp bench kernel`.
#pragma once

#include "kernel.hpp"

namespace osp {

// Median seconds of the product of `rows` rows of random 4-bit codes (floats where the format is one) with a random
// matrix, measured for about `seconds`. Throws std::invalid_argument where a size is not positive.
double time_product(const Kernel& kernel, Format format, int rows, int outputs, int columns, int threads,
                    double seconds);

}  // namespace osp
