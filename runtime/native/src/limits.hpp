// What the machine can do at most, measured: what speeds are set in relation to.
#pragma once

#include <cstddef>

#include "kernel.hpp"

namespace osp {

// Reads from memory in 10^9 bytes a second, on `threads` threads that share `bytes`, for about `seconds`.
// Throws std::invalid_argument where there is nothing to read or no thread, std::bad_alloc.
double read_GBps(std::size_t bytes, int threads, double seconds);

// 8-bit multiplications and additions of a kernel's dot products in registers, in 10^9 a second.
// Throws std::invalid_argument where there is no thread.
double dot_GOPS(const Kernel& kernel, int threads, double seconds);

}  // namespace osp
