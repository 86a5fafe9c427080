#include "buffer.hpp"

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace osp {
namespace {

constexpr std::size_t kAlignment = 64, kHugePage = std::size_t{2} << 20;

}  // namespace

Buffer::Buffer(std::size_t bytes, [[maybe_unused]] bool huge) : bytes_(bytes) {
    if (bytes == 0) return;
#if defined(__linux__)
    // mmap gives zero pages, whole pages of which are only there once written.
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    if (huge && bytes >= kHugePage)
        madvise(at, bytes, MADV_HUGEPAGE);  // advice: where it is not taken, nothing is lost
    data_ = static_cast<std::uint8_t*>(at);
#else
    const std::size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    void* at = std::aligned_alloc(kAlignment, rounded);
    if (at == nullptr) throw std::bad_alloc();
    std::memset(at, 0, rounded);
    data_ = static_cast<std::uint8_t*>(at);
#endif
}

Buffer::~Buffer() {
    if (data_ == nullptr) return;
#if defined(__linux__)
    munmap(data_, bytes_);
#else
    std::free(data_);
#endif
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
}

}  // namespace osp
