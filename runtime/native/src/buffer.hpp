// Memory for weights, caches and activations: 64-byte aligned, zeroed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace osp {

constexpr std::size_t kCacheLineBytes = 64;

// Whole cache lines that hold so many bytes; in bytes too.
constexpr std::size_t lines(std::size_t bytes) {
    return (bytes + kCacheLineBytes - 1) / kCacheLineBytes * kCacheLineBytes;
}

// What memory comes in, where the system has a choice. A page that is written anywhere takes memory whole.
enum class Pages : std::uint8_t {
    kHuge,    // of its own, huge if there is room for one
    kSmall,   // of its own, for what is written here and there
    kShared,  // huge ones, together with other buffers of this kind: they are given back when the last of these goes
};

class Buffer {
  public:
    Buffer() = default;
    // Throws std::bad_alloc. The memory costs nothing before it is written.
    explicit Buffer(std::size_t bytes, Pages pages = Pages::kHuge);
    ~Buffer() = default;
    Buffer(Buffer&& other) noexcept;
    Buffer& operator=(Buffer&& other) noexcept;

    std::uint8_t* data() const { return data_; }
    std::size_t size() const { return bytes_; }
    template <typename T>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }

  private:
    std::shared_ptr<const void> memory_;
    std::uint8_t* data_ = nullptr;
    std::size_t bytes_ = 0;
};

}  // namespace osp
