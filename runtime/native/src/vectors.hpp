// Vectors of 16 lanes on any instruction set. Where a register holds fewer, a vector is a pair of halves, down to what a
// register holds: compilers that split wide vectors by themselves keep them in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC 12 in its own header: _mm512_undefined_ps and others
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernel.hpp"

#define OSP_INLINE inline __attribute__((always_inline))

// Loops over the registers of a tile: their trip counts are constants, and what they index must not be memory.
#define OSP_UNROLL _Pragma("GCC unroll 16")

namespace osp {
namespace {

#if defined(__AVX512F__)
constexpr int kNativeLanes = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kNativeLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kNativeLanes = 4, kRegisters = 32;
#else
constexpr int kNativeLanes = 4, kRegisters = 16;
#endif

// Vectors of 16 lanes that all registers hold together: what the sizes of tiles go by.
constexpr int kVectors = kRegisters * kNativeLanes / kLanes;

typedef float NativeFloats __attribute__((vector_size(4 * kNativeLanes)));
typedef std::int32_t NativeInts __attribute__((vector_size(4 * kNativeLanes)));
typedef std::uint32_t NativeWords __attribute__((vector_size(4 * kNativeLanes)));

// Lanes 0 … n/2 - 1 and n/2 … n - 1.
template <typename Half>
struct Pair {
    Half low, high;
};

template <typename Native, int lanes>
struct Widened {
    using Type = Pair<typename Widened<Native, lanes / 2>::Type>;
};
template <typename Native>
struct Widened<Native, kNativeLanes> {
    using Type = Native;
};

using Floats = Widened<NativeFloats, kLanes>::Type;
using Ints = Widened<NativeInts, kLanes>::Type;
using Words = Widened<NativeWords, kLanes>::Type;

template <typename Vector>
constexpr bool kIsNative = sizeof(Vector) == sizeof(NativeFloats);
template <typename Vector>
constexpr int kLanesOf = sizeof(Vector) / sizeof(float);

// Comparisons give 0 or -1 in each lane, as they do for native vectors.
#define OSP_LANEWISE(op)                                                         \
    template <typename Half>                                                     \
    OSP_INLINE auto operator op(Pair<Half> a, Pair<Half> b) {                    \
        return Pair<decltype(a.low op b.low)>{a.low op b.low, a.high op b.high}; \
    }
OSP_LANEWISE(+)
OSP_LANEWISE(-)
OSP_LANEWISE(*)
OSP_LANEWISE(/)
OSP_LANEWISE(&)
OSP_LANEWISE(|)
OSP_LANEWISE(<)
OSP_LANEWISE(>)
OSP_LANEWISE(==)
OSP_LANEWISE(!=)
#undef OSP_LANEWISE

template <typename Half>
OSP_INLINE Pair<Half> operator-(Pair<Half> a) {
    return {-a.low, -a.high};
}
template <typename Half>
OSP_INLINE Pair<Half> operator<<(Pair<Half> a, int by) {
    return {a.low << by, a.high << by};
}
template <typename Half>
OSP_INLINE Pair<Half> operator>>(Pair<Half> a, int by) {
    return {a.low >> by, a.high >> by};
}

template <typename To, typename From>
OSP_INLINE To bits_as(From v) {
    if constexpr (kIsNative<To>)
        return reinterpret_cast<To>(v);
    else
        return {bits_as<decltype(To::low)>(v.low), bits_as<decltype(To::high)>(v.high)};
}

template <typename To, typename From>
OSP_INLINE To converted(From v) {
    if constexpr (kIsNative<To>)
        return __builtin_convertvector(v, To);
    else
        return {converted<decltype(To::low)>(v.low), converted<decltype(To::high)>(v.high)};
}

OSP_INLINE Words bits_of(Floats v) { return bits_as<Words>(v); }
OSP_INLINE Floats floats_of(Words v) { return bits_as<Floats>(v); }
OSP_INLINE Floats to_floats(Ints v) { return converted<Floats>(v); }
OSP_INLINE Ints to_ints(Floats v) { return converted<Ints>(v); }

template <typename Vector, typename Element>
OSP_INLINE Vector filled(Element x) {
    if constexpr (kIsNative<Vector>) {
        return x - Vector{};
    } else {
        const auto half = filled<decltype(Vector::low)>(x);
        return {half, half};
    }
}

OSP_INLINE Floats broadcast(float x) { return filled<Floats>(x); }
OSP_INLINE Ints broadcast(std::int32_t x) { return filled<Ints>(x); }
OSP_INLINE Words broadcast(std::uint32_t x) { return filled<Words>(x); }

// a where the mask is -1, b where it is 0.
template <typename Mask, typename Vector>
OSP_INLINE Vector select(Mask mask, Vector a, Vector b) {
    if constexpr (kIsNative<Vector>)
        return mask ? a : b;
    else
        return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
}

template <typename Vector>
OSP_INLINE Vector load(const void* from) {
    if constexpr (kIsNative<Vector>) {
        Vector v;
        std::memcpy(&v, from, sizeof v);
        return v;
    } else {
        const auto* bytes = static_cast<const std::uint8_t*>(from);
        return {load<decltype(Vector::low)>(bytes), load<decltype(Vector::high)>(bytes + sizeof(Vector) / 2)};
    }
}

template <typename Vector>
OSP_INLINE void store(void* to, Vector v) {
    if constexpr (kIsNative<Vector>) {
        std::memcpy(to, &v, sizeof v);
    } else {
        store(to, v.low);
        store(static_cast<std::uint8_t*>(to) + sizeof(Vector) / 2, v.high);
    }
}

}  // namespace
}  // namespace osp
