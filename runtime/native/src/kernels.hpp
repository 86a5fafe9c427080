// The kernels that were compiled in, and the one that this processor runs best.
#pragma once

#include <string_view>
#include <vector>

#include "kernel.hpp"

namespace osp {

// Those that this processor can run, the best first; "portable" is always among them.
std::vector<const Kernel*> available_kernels();

// The one called `name`, or the best for an empty name. Throws std::invalid_argument, listing those there are.
const Kernel& find_kernel(std::string_view name);

}  // namespace osp
