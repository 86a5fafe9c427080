// A kernel's table: what it does in its own way, and what all of them compile from one source.
#pragma once

#include "attention.hpp"
#include "float_product.hpp"
#include "tiles.hpp"

namespace osp {
namespace {

constexpr Kernel kernel_table(const char* name, decltype(Kernel::integer_product) integer_product,
                              decltype(Kernel::peak_dots) peak_dots) {
    return {name, integer_product, float_product, rms_norm, quantize_static, quantize_token, swiglu,
            add,  hadamard,        rotate,        write_kv, attend,          argmax,         peak_dots};
}

}  // namespace
}  // namespace osp
