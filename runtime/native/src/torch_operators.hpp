// `PackedLinear` as operators of PyTorch, called without Python. They use PyTorch's stable C interface, whose functions
// are looked up at run time: the extension is built and loaded where there is no PyTorch.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace osp {

// Implements, for tensors on CPUs, the operators that PyTorch knows by these schemas:
//
//     osp::native_linear(Tensor x_NK, Tensor layer, int outputs, ScalarType dtype) -> Tensor
//     osp::native_product(Tensor codes_NK, Tensor scales_N, Tensor layer, int outputs, ScalarType dtype) -> Tensor
//
// `layer` is int64 [1], the address of a PackedLinear; `outputs` is for who must know the shape before.
// `address_of` gives the address of a function by its name in PyTorch, which is loaded, and throws where there is none.
// Throws std::runtime_error where PyTorch does not take the operators.
void implement_torch_operators(const std::function<std::uintptr_t(const std::string&)>& address_of);

}  // namespace osp
