#include "torch_operators.hpp"

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "packed_linear.hpp"
#include "stored_codes.hpp"

namespace osp {
namespace {

// The types of PyTorch's torch/csrc/stable and aoti_torch/c/shim.h. A value is an operator's argument or result: a
// handle, or a number in its first bytes.
using Value = std::uint64_t;
using Status = std::int32_t;
struct OpaqueTensor;
struct OpaqueLibrary;
using TensorHandle = OpaqueTensor*;
using LibraryHandle = OpaqueLibrary*;
using Operator = void (*)(Value* stack, std::uint64_t inputs, std::uint64_t outputs);

struct Torch {
    Status (*aoti_torch_delete_tensor_object)(TensorHandle);
    Status (*aoti_torch_get_data_ptr)(TensorHandle, void**);
    Status (*aoti_torch_get_dim)(TensorHandle, std::int64_t*);
    Status (*aoti_torch_get_size)(TensorHandle, std::int64_t, std::int64_t*);
    Status (*aoti_torch_get_dtype)(TensorHandle, std::int32_t*);
    Status (*aoti_torch_is_contiguous)(TensorHandle, bool*);
    Status (*aoti_torch_empty_strided)(std::int64_t, const std::int64_t*, const std::int64_t*, std::int32_t,
                                       std::int32_t, std::int32_t, TensorHandle*);
    std::int32_t int8, int64, bfloat16, float32, cpu;
};

Torch torch;  // written once, before an operator can be called

void check(Status status, const char* what) {
    if (status != 0) throw std::runtime_error(std::string("PyTorch could not ") + what);
}

// A tensor that is owned.
class Tensor {
  public:
    explicit Tensor(TensorHandle handle) : handle_(handle) {}
    explicit Tensor(Value value) : Tensor(reinterpret_cast<TensorHandle>(value)) {}
    ~Tensor() {
        if (handle_ != nullptr) torch.aoti_torch_delete_tensor_object(handle_);
    }
    Tensor(const Tensor&) = delete;
    Tensor& operator=(const Tensor&) = delete;

    void* data() const {
        void* at = nullptr;
        check(torch.aoti_torch_get_data_ptr(handle_, &at), "find a tensor's data");
        return at;
    }
    std::int32_t type() const {
        std::int32_t type = 0;
        check(torch.aoti_torch_get_dtype(handle_, &type), "tell a tensor's type");
        return type;
    }
    std::int64_t size(std::int64_t dimension) const {
        std::int64_t size = 0;
        check(torch.aoti_torch_get_size(handle_, dimension, &size), "tell a tensor's size");
        return size;
    }
    void require_shape(std::int64_t dimensions, const char* what) const {
        std::int64_t present = 0;
        bool contiguous = false;
        check(torch.aoti_torch_get_dim(handle_, &present), "tell a tensor's dimensions");
        check(torch.aoti_torch_is_contiguous(handle_, &contiguous), "tell a tensor's layout");
        require(present == dimensions && contiguous, what);
    }
    Value release() { return reinterpret_cast<Value>(std::exchange(handle_, nullptr)); }

  private:
    TensorHandle handle_;
};

const PackedLinear& layer_of(const Tensor& layer) {
    require(layer.type() == torch.int64, "a layer is the handle that PackedLinear gives");
    return *reinterpret_cast<const PackedLinear*>(*static_cast<const std::int64_t*>(layer.data()));
}

Number number_of(std::int32_t type) {
    require(type == torch.float32 || type == torch.bfloat16, "rows are float32 or bfloat16");
    return type == torch.float32 ? Number::kFloat32 : Number::kBfloat16;
}

Tensor empty(std::int64_t rows, std::int64_t columns, std::int32_t type) {
    const std::int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
    TensorHandle handle = nullptr;
    check(torch.aoti_torch_empty_strided(2, sizes, strides, type, torch.cpu, 0, &handle), "allocate the outputs");
    return Tensor(handle);
}

int rows_of(const Tensor& rows, const PackedLinear& linear) {
    rows.require_shape(2, "the rows are not a contiguous matrix");
    require(rows.size(1) == linear.matrix().columns(), "the rows have other columns than the weights");
    return extent(static_cast<std::size_t>(rows.size(0)));
}

void native_linear(Value* stack, std::uint64_t, std::uint64_t) {
    const Tensor x(stack[0]), layer(stack[1]);
    const auto type = static_cast<std::int32_t>(stack[3]);
    const PackedLinear& linear = layer_of(layer);
    const int rows = rows_of(x, linear);
    const Number from = number_of(x.type()), to = number_of(type);
    Tensor y = empty(rows, linear.matrix().rows(), type);
    linear.forward(x.data(), from, rows, y.data(), to);
    stack[0] = y.release();
}

void native_product(Value* stack, std::uint64_t, std::uint64_t) {
    const Tensor codes(stack[0]), scales(stack[1]), layer(stack[2]);
    const auto type = static_cast<std::int32_t>(stack[4]);
    const PackedLinear& linear = layer_of(layer);
    const int rows = rows_of(codes, linear);
    scales.require_shape(1, "the scales are not a contiguous vector");
    require(codes.type() == torch.int8, "codes are int8");
    require(scales.type() == torch.float32 && scales.size(0) == rows, "there is not a float32 scale for each row");
    const Number to = number_of(type);
    Tensor y = empty(rows, linear.matrix().rows(), type);
    linear.multiply(static_cast<const std::int8_t*>(codes.data()), static_cast<const float*>(scales.data()), rows,
                    y.data(), to);
    stack[0] = y.release();
}

}  // namespace

void implement_torch_operators(const std::function<std::uintptr_t(const std::string&)>& address_of) {
    const auto find = [&](auto& function, const char* name) {
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(address_of(name));
    };
    const auto constant = [&](std::int32_t& value, const char* name) {
        std::int32_t (*function)() = nullptr;
        find(function, name);
        value = function();
    };
    find(torch.aoti_torch_delete_tensor_object, "aoti_torch_delete_tensor_object");
    find(torch.aoti_torch_get_data_ptr, "aoti_torch_get_data_ptr");
    find(torch.aoti_torch_get_dim, "aoti_torch_get_dim");
    find(torch.aoti_torch_get_size, "aoti_torch_get_size");
    find(torch.aoti_torch_get_dtype, "aoti_torch_get_dtype");
    find(torch.aoti_torch_is_contiguous, "aoti_torch_is_contiguous");
    find(torch.aoti_torch_empty_strided, "aoti_torch_empty_strided");
    constant(torch.int8, "aoti_torch_dtype_int8");
    constant(torch.int64, "aoti_torch_dtype_int64");
    constant(torch.bfloat16, "aoti_torch_dtype_bfloat16");
    constant(torch.float32, "aoti_torch_dtype_float32");
    constant(torch.cpu, "aoti_torch_device_type_cpu");

    Status (*start)(const char*, const char*, const char*, std::uint32_t, LibraryHandle*) = nullptr;
    Status (*add)(LibraryHandle, const char*, Operator) = nullptr;
    find(start, "aoti_torch_library_init_impl");
    find(add, "aoti_torch_library_impl");
    LibraryHandle library = nullptr;  // stays as long as the process: deleting it would take the operators back
    check(start("osp", "CPU", "torch_operators.cpp", 0, &library), "register operators");
    check(add(library, "native_linear", &native_linear), "register native_linear");
    check(add(library, "native_product", &native_product), "register native_product");
}

}  // namespace osp
