// Memory for weights, caches and activations: 64-byte aligned, zeroed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace osp {

class Buffer {
  public:
    Buffer() = default;
    // Throws std::bad_alloc. The memory costs nothing before it is written.
    // `huge`: in huge pages, where the system has them; not for what is written here and there, since a page that is
    // written anywhere takes memory whole.
    explicit Buffer(std::size_t bytes, bool huge = true);
    ~Buffer();
    Buffer(Buffer&& other) noexcept;
    Buffer& operator=(Buffer&& other) noexcept;

    std::uint8_t* data() const { return data_; }
    std::size_t size() const { return bytes_; }
    template <typename T>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }

  private:
    std::uint8_t* data_ = nullptr;
    std::size_t bytes_ = 0;
};

}  // namespace osp
