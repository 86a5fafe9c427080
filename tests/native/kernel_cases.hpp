// What the programs that test kernels share: random inputs, buffers that end where they end, and comparisons.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace kernel_test {

using namespace osp;

// A comparison that fails ends the program; the words are only put together then.
#define CHECK(condition, ...)                                                            \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            std::fprintf(stderr, __VA_ARGS__);                                           \
            std::fprintf(stderr, "\n");                                                  \
            std::exit(1);                                                                \
        }                                                                                \
    } while (false)

constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();

// Memory on a boundary of 64 bytes that ends, to the byte, where it must not be read or written any more.
template <typename T>
class Exact {
  public:
    explicit Exact(std::size_t count, T value = T()) : count_(count) {
        data_ = static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64)));
        for (std::size_t i = 0; i < count; ++i) data_[i] = value;
    }
    Exact(const T* from, std::size_t count) : Exact(count) { std::memcpy(data_, from, count * sizeof(T)); }
    ~Exact() { ::operator delete(data_, std::align_val_t(64)); }
    Exact(const Exact&) = delete;
    Exact& operator=(const Exact&) = delete;

    T* data() { return data_; }
    const T* data() const { return data_; }
    std::size_t size() const { return count_; }
    T& operator[](std::size_t i) { return data_[i]; }
    const T& operator[](std::size_t i) const { return data_[i]; }

  private:
    T* data_;
    std::size_t count_;
};

class Random {
  public:
    explicit Random(unsigned seed) : engine_(seed) {}
    int integer(int lowest, int highest) {
        return lowest + static_cast<int>(engine_() % static_cast<unsigned>(highest - lowest + 1));
    }
    // Between -1 and 1, with many small ones.
    float number() {
        const float x = static_cast<float>(integer(-1 << 20, 1 << 20)) * 0x1p-20f;
        return x * std::fabs(x);
    }
    void numbers(float* to, std::size_t count, float scale = 1) {
        for (std::size_t i = 0; i < count; ++i) to[i] = number() * scale;
    }

  private:
    std::mt19937 engine_;
};

// The same bits, or both NaN.
inline bool same(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0 || (a != a && b != b); }

inline bool same(const float* a, const float* b, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i)
        if (!same(a[i], b[i])) return false;
    return true;
}

// Whether this kernel's multiply_add rounds once. Those that do agree with one another bit for bit.
inline bool is_fused(const Kernel& kernel) {
#if defined(__x86_64__)
    return std::strcmp(kernel.name, "portable") != 0;
#else
    return kernel.name != nullptr;
#endif
}

inline float from_bfloat16(std::uint16_t half) {
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// To the nearest, ties to even.
inline std::uint16_t to_bfloat16(float x) {
    if (x != x) return 0x7fc0;
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint32_t below = bits & 0xffffu, upper = bits >> 16;
    return static_cast<std::uint16_t>(upper + (below > 0x8000u || (below == 0x8000u && (upper & 1u)) ? 1 : 0));
}

}  // namespace kernel_test
