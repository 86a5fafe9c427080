#include "buffer.hpp"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace osp {

#if defined(__linux__)

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kSharedBytes = 16 * kHugePage;  // address space, of which what is written takes memory

// Zero pages from the system, whole pages of which are only there once written.
class Mapping {
  public:
    Mapping(std::size_t bytes, bool huge) : bytes_(bytes) {
        void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) throw std::bad_alloc();
        data_ = static_cast<std::uint8_t*>(at);
        if (huge) madvise(at, bytes, MADV_HUGEPAGE);  // advice: where it is not taken, nothing is lost
    }
    ~Mapping() { munmap(data_, bytes_); }
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    std::uint8_t* data() const { return data_; }

    // So many bytes that nobody has taken, or none if there is no room.
    std::uint8_t* take(std::size_t bytes) {
        if (bytes > bytes_ - taken_) return nullptr;
        return data_ + std::exchange(taken_, taken_ + bytes);
    }

  private:
    std::uint8_t* data_;
    std::size_t bytes_, taken_ = 0;
};

struct Piece {
    std::shared_ptr<const Mapping> of;
    std::uint8_t* data;
};

// A part of the mapping that is being filled; of a new one when that is full, or when all who had a part of it are gone.
Piece shared_piece(std::size_t bytes) {
    static std::mutex mutex;
    static std::weak_ptr<Mapping> filling;
    const std::lock_guard lock(mutex);
    std::shared_ptr<Mapping> mapping = filling.lock();
    std::uint8_t* data = mapping ? mapping->take(bytes) : nullptr;
    if (data == nullptr) {
        filling = mapping = std::make_shared<Mapping>(kSharedBytes, true);
        data = mapping->take(bytes);
    }
    return {std::move(mapping), data};
}

}  // namespace

#endif

Buffer::Buffer(std::size_t bytes, [[maybe_unused]] Pages pages) : bytes_(bytes) {
    if (bytes == 0) return;
#if defined(__linux__)
    if (pages == Pages::kShared && bytes < kHugePage) {
        Piece piece = shared_piece(lines(bytes));
        memory_ = std::move(piece.of);
        data_ = piece.data;
    } else {
        const auto mapping = std::make_shared<const Mapping>(bytes, pages != Pages::kSmall && bytes >= kHugePage);
        memory_ = mapping;
        data_ = mapping->data();
    }
#else
    memory_ = std::shared_ptr<void>(std::aligned_alloc(kCacheLineBytes, lines(bytes)), std::free);
    if (!memory_) throw std::bad_alloc();
    data_ = static_cast<std::uint8_t*>(const_cast<void*>(memory_.get()));
    std::memset(data_, 0, bytes);
#endif
}

Buffer::Buffer(Buffer&& other) noexcept
    : memory_(std::move(other.memory_)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
}

}  // namespace osp
