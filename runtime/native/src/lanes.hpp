// What kernels do with vectors of 16 lanes: every kernel includes this and compiles it for its own instruction set.
// Everything is in an unnamed namespace and inlined, so that no function compiled for one set is linked into another;
// kernels use nothing of the standard library's templates for the same reason.
#pragma once

#include "vectors.hpp"

namespace osp {
namespace {

OSP_INLINE Floats load(const float* from) { return load<Floats>(from); }

// A vector that is no pair, of any size.
template <typename Vector>
OSP_INLINE Vector load_whole(const void* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// The first `count` floats, the other lanes 0; nothing beyond them is read.
OSP_INLINE Floats load_first(const float* from, int count) {
    if (count >= kLanes) return load(from);
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from));
#else
    float all[kLanes] = {};
    std::memcpy(all, from, static_cast<std::size_t>(count) * sizeof(float));
    return load(all);
#endif
}

OSP_INLINE void store_first(float* to, Floats v, int count) {
    if (count >= kLanes) return store(to, v);
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m512>(v));
#else
    float all[kLanes];
    store(all, v);
    std::memcpy(to, all, static_cast<std::size_t>(count) * sizeof(float));
#endif
}

// 16 bytes, each an unsigned number.
OSP_INLINE Ints load_bytes(const std::uint8_t* from) {
#if defined(__AVX512F__)
    return reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
    return {reinterpret_cast<NativeInts>(_mm256_cvtepu8_epi32(_mm_loadu_si64(from))),
            reinterpret_cast<NativeInts>(_mm256_cvtepu8_epi32(_mm_loadu_si64(from + 8)))};
#else
    typedef std::uint8_t Bytes __attribute__((vector_size(16)));
    typedef std::uint16_t Halves __attribute__((vector_size(16)));
    // Zeros between the bytes, then between the pairs: what compilers know as interleaving.
    const Bytes bytes = load_whole<Bytes>(from), none = {};
    const Halves low = reinterpret_cast<Halves>(
        __builtin_shufflevector(bytes, none, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
    const Halves high = reinterpret_cast<Halves>(
        __builtin_shufflevector(bytes, none, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
    const Halves zero = {};
    return {{reinterpret_cast<NativeInts>(__builtin_shufflevector(low, zero, 0, 8, 1, 9, 2, 10, 3, 11)),
             reinterpret_cast<NativeInts>(__builtin_shufflevector(low, zero, 4, 12, 5, 13, 6, 14, 7, 15))},
            {reinterpret_cast<NativeInts>(__builtin_shufflevector(high, zero, 0, 8, 1, 9, 2, 10, 3, 11)),
             reinterpret_cast<NativeInts>(__builtin_shufflevector(high, zero, 4, 12, 5, 13, 6, 14, 7, 15))}};
#endif
}

// 16 bfloat16 numbers.
OSP_INLINE Floats load_bfloat16(const std::uint8_t* from) {
#if defined(__AVX512F__)
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return reinterpret_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#elif defined(__AVX2__)
    const auto widened = [from](int i) __attribute__((always_inline)) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i);
        return reinterpret_cast<NativeFloats>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    };
    return {widened(0), widened(1)};
#else
    typedef std::uint16_t Halves __attribute__((vector_size(16)));
    const Halves low = load_whole<Halves>(from), high = load_whole<Halves>(from + sizeof low);
    const Halves zero = {};  // below the sixteen bits of each, which are a float's upper ones
    return {{reinterpret_cast<NativeFloats>(__builtin_shufflevector(zero, low, 0, 8, 1, 9, 2, 10, 3, 11)),
             reinterpret_cast<NativeFloats>(__builtin_shufflevector(zero, low, 4, 12, 5, 13, 6, 14, 7, 15))},
            {reinterpret_cast<NativeFloats>(__builtin_shufflevector(zero, high, 0, 8, 1, 9, 2, 10, 3, 11)),
             reinterpret_cast<NativeFloats>(__builtin_shufflevector(zero, high, 4, 12, 5, 13, 6, 14, 7, 15))}};
#endif
}

// The low bytes of `count` lanes, to int8 or uint8.
OSP_INLINE void store_bytes(void* to, Ints v, int count) {
#if defined(__AVX512F__)
    const __m128i narrow = _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v));
    std::memcpy(to, &narrow, static_cast<std::size_t>(count < kLanes ? count : kLanes));
#else
    std::uint8_t narrow[kLanes];
    std::int32_t lanes[kLanes];
    store(lanes, v);
    for (int i = 0; i < kLanes; ++i) narrow[i] = static_cast<std::uint8_t>(lanes[i]);
    std::memcpy(to, narrow, static_cast<std::size_t>(count < kLanes ? count : kLanes));
#endif
}

// a * b + c: one rounding where the instruction set has that, and two in the portable kernel of x86.
template <typename Vector>
OSP_INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
    if constexpr (!kIsNative<Vector>) {
        return {multiply_add(a.low, b.low, c.low), multiply_add(a.high, b.high, c.high)};
    } else {
#if defined(__AVX512F__)
        return reinterpret_cast<Vector>(
            _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
        return reinterpret_cast<Vector>(
            _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__aarch64__)
        return reinterpret_cast<Vector>(vfmaq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a),
                                                  reinterpret_cast<float32x4_t>(b)));
#else
        return a * b + c;
#endif
    }
}

constexpr std::int32_t kLaneNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// first, first + 1, …
OSP_INLINE Ints indices(int first) { return load<Ints>(kLaneNumbers) + broadcast(first); }

// Lane i of the result is lane i ^ step.
template <int step, typename Native>
OSP_INLINE Native exchanged(Native v) {
#if defined(__clang__)
    Native partner;
    for (int i = 0; i < kNativeLanes; ++i) partner[i] = v[i ^ step];
    return partner;
#else
    return __builtin_shuffle(v, load<NativeInts>(kLaneNumbers) ^ step);
#endif
}

// A NaN in `a` gives b.
OSP_INLINE Floats smaller(Floats a, Floats b) { return select(a < b, a, b); }
OSP_INLINE Floats larger(Floats a, Floats b) { return select(a > b, a, b); }

// To the nearest integer, ties to even, of |x| < 2^22: adding 1.5 * 2^23 leaves no bits for the fraction.
OSP_INLINE Floats nearest(Floats x) {
    const Floats shift = broadcast(12582912.0f);
    return (x + shift) - shift;
}

// Sums as a tree: lanes i and i + 8, then i and i + 4, …
template <typename Element, typename Vector>
OSP_INLINE Element tree_sum(Vector v) {
    Element lanes[kLanes];
    store(lanes, v);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

OSP_INLINE float sum_of(Floats v) { return tree_sum<float>(v); }
OSP_INLINE std::int32_t sum_of(Ints v) { return tree_sum<std::int32_t>(v); }

OSP_INLINE float largest_of(Floats v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

OSP_INLINE bool any(Ints mask) {
    std::uint64_t parts[kLanes / 2], all = 0;
    store(parts, mask);
    for (std::uint64_t part : parts) all |= part;
    return all != 0;
}

// e^x to within 2 units in the last place; 0 and infinity where float32 ends, NaN for NaN.
// Cephes' expf: x = n ln 2 + r, a polynomial of degree 6 for e^r.
OSP_INLINE Floats exponential(Floats x) {
    x = select(x > broadcast(90.0f), broadcast(90.0f), x);
    x = select(x < broadcast(-105.0f), broadcast(-105.0f), x);
    const Floats n = nearest(x * broadcast(1.44269504088896341f));
    Floats r = multiply_add(n, broadcast(-0.693359375f), x);
    r = multiply_add(n, broadcast(2.12194440e-4f), r);
    Floats p = broadcast(1.9875691500e-4f);
    p = multiply_add(p, r, broadcast(1.3981999507e-3f));
    p = multiply_add(p, r, broadcast(8.3334519073e-3f));
    p = multiply_add(p, r, broadcast(4.1665795894e-2f));
    p = multiply_add(p, r, broadcast(1.6666665459e-1f));
    p = multiply_add(p, r, broadcast(5.0000001201e-1f));
    p = multiply_add(p, r * r, r) + broadcast(1.0f);
    // 2^n in two factors: n may lie beyond the exponents of float32 on either side.
    const Ints whole = to_ints(select(n == n, n, Floats{})), half = whole >> 1, bias = broadcast(127);
    const Floats first = bits_as<Floats>((half + bias) << 23);
    const Floats second = bits_as<Floats>((whole - half + bias) << 23);
    return p * first * second;
}

}  // namespace
}  // namespace osp
