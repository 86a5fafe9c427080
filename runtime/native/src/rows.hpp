// What kernels do to single rows: norms, quantization, SwiGLU, Hadamard transforms, rotary embedding, argmax.
#pragma once

#include "lanes.hpp"

namespace osp {
namespace {

constexpr float kSmallestScale = 0x1p-126f;   // quant.arithmetic.BFLOAT16_TINY
constexpr float kLargestScale = 0x1.fep127f;  // quant.arithmetic.BFLOAT16_MAX

OSP_INLINE Ints is_nan(Floats x) { return x != x; }
OSP_INLINE Floats magnitude(Floats x) { return floats_of(bits_of(x) & broadcast(0x7fffffffu)); }
OSP_INLINE bool is_finite(float x) { return x - x == 0; }

void rms_norm(const float* x, const float* weight, int width, float eps, float* y) {
    Floats squares = {};
    for (int i = 0; i < width; i += kLanes) {
        const Floats v = load_first(x + i, width - i);
        squares = squares + v * v;
    }
    const float mean = sum_of(squares) / static_cast<float>(width);
    const Floats rms = broadcast(__builtin_sqrtf(mean + eps));
    for (int i = 0; i < width; i += kLanes)
        store_first(y + i, load_first(x + i, width - i) / rms * load_first(weight + i, width - i), width - i);
}

// Codes of a row whose scale is known; NaN becomes 0. Returns whether there was a NaN.
bool quantize_row(const float* x, int width, int padded, float scale, int bits, std::int8_t* codes, std::int32_t* sum) {
    const Floats lowest = broadcast(bits == 4 ? -8.0f : -128.0f), highest = broadcast(bits == 4 ? 7.0f : 127.0f);
    const Floats divisor = broadcast(scale);
    Ints total = {}, lost = {};
    for (int i = 0; i < width; i += kLanes) {
        const Floats v = load_first(x + i, width - i);
        lost = lost | is_nan(v);
        Floats q = v / divisor;
        q = select(is_nan(q), Floats{}, q);
        const Ints code = to_ints(nearest(smaller(larger(q, lowest), highest)));
        total = total + code;
        store_bytes(codes + i, code, width - i);
    }
    std::memset(codes + width, 0, static_cast<std::size_t>(padded - width));
    *sum = sum_of(total);
    return any(lost);
}

void quantize_static(const float* x, int width, int padded, float scale, int bits, std::int8_t* codes,
                     std::int32_t* sum, float* row_scale) {
    const bool lost = quantize_row(x, width, padded, scale, bits, codes, sum);
    *row_scale = lost ? __builtin_nanf("") : scale;
}

void quantize_token(const float* x, int width, int padded, int bits, std::int8_t* codes, std::int32_t* sum,
                    float* row_scale) {
    Floats largest = {};
    Ints lost = {};
    for (int i = 0; i < width; i += kLanes) {
        const Floats v = load_first(x + i, width - i);
        lost = lost | is_nan(v);
        largest = larger(magnitude(v), largest);
    }
    const float absmax = largest_of(largest);
    float scale = absmax / (bits == 4 ? 7.0f : 127.0f);
    scale = absmax == 0 ? 1.0f : (scale > kSmallestScale ? scale : kSmallestScale);
    if (any(lost) || !is_finite(absmax)) {
        std::memset(codes, 0, static_cast<std::size_t>(padded));
        *sum = 0;
        *row_scale = __builtin_nanf("");
        return;
    }
    quantize_row(x, width, padded, scale, bits, codes, sum);
    *row_scale = scale;
}

void swiglu(const float* gate, const float* up, int width, float* y) {
    for (int i = 0; i < width; i += kLanes) {
        const Floats g = load_first(gate + i, width - i), u = load_first(up + i, width - i);
        store_first(y + i, g / (broadcast(1.0f) + exponential(-g)) * u, width - i);
    }
}

void add(const float* x, int width, float* sum) {
    for (int i = 0; i < width; i += kLanes)
        store_first(sum + i, load_first(sum + i, width - i) + load_first(x + i, width - i), width - i);
}

// Lane i with lane i ^ step: their sum in the first of them, their difference in the second.
template <int step, typename Vector>
OSP_INLINE Vector butterfly(Vector v) {
    if constexpr (kIsNative<Vector>) {
        const NativeInts first = (load<NativeInts>(kLaneNumbers) & step) == 0;
        // Exact: a product with 1 or -1 is, so that this is an addition.
        return multiply_add(v, select(first, filled<Vector>(1.0f), filled<Vector>(-1.0f)), exchanged<step>(v));
    } else if constexpr (2 * step == kLanesOf<Vector>) {
        return {v.low + v.high, v.low - v.high};
    } else {
        return {butterfly<step>(v.low), butterfly<step>(v.high)};
    }
}

// The Sylvester part: butterflies with strides 1, 2, 4, … below `power`, over `count` channels.
void butterflies(float* x, int count, int power) {
    int step = 1;
    if (power >= kLanes) {
        for (int i = 0; i < count; i += kLanes) {
            const Floats v = butterfly<2>(butterfly<1>(load(x + i)));
            store(x + i, butterfly<8>(butterfly<4>(v)));
        }
        for (step = kLanes; step < power; step *= 2)
            for (int start = 0; start < count; start += 2 * step)
                for (int i = start; i < start + step; i += kLanes) {
                    const Floats first = load(x + i), second = load(x + i + step);
                    store(x + i, first + second);
                    store(x + i + step, first - second);
                }
        return;
    }
    for (; step < power; step *= 2)
        for (int start = 0; start < count; start += 2 * step)
            for (int i = start; i < start + step; ++i) {
                const float first = x[i], second = x[i + step];
                x[i] = first + second;
                x[i + step] = first - second;
            }
}

// Of four vectors, the 16 sums (a ± b) + (c ± d) with every choice of signs: bit i of the index negates the i-th.
OSP_INLINE void combine_four(Floats a, Floats b, Floats c, Floats d, float* sums) {
    const Floats left[2] = {a + b, a - b}, right[2] = {c + d, c - d};
    OSP_UNROLL
    for (int bits = 0; bits < 8; ++bits) {  // b, c and d; with a's sign all four turn
        const Floats first = left[bits & 1], second = right[(bits >> 1 ^ bits >> 2) & 1];
        const Floats sum = bits & 2 ? first - second : first + second;
        store(sums + (bits << 1) * kLanes, sum);
        store(sums + (~(bits << 1) & 15) * kLanes, Floats{} - sum);
    }
}

// The part of the base matrix: each output is the sum, first to last, of a combination of every four channels. With a
// table of the combinations that is a quarter of the additions.
void mix(const HadamardPlan& plan, const float* x, float* table, float* y) {
    const int base = plan.base, power = plan.power, groups = base / 4;
    for (int j = 0; j < power; j += kLanes) {
        const int left = power - j;
        for (int g = 0; g < groups; ++g) {
            const float* four = x + 4 * g * power + j;
            combine_four(load_first(four, left), load_first(four + power, left), load_first(four + 2 * power, left),
                         load_first(four + 3 * power, left), table + g * 16 * kLanes);
        }
        for (int i = 0; i < base; i += 4) {  // four at a time, for their additions to overlap
            const std::uint8_t* chosen = plan.combinations + i * groups;
            Floats sums[4] = {};
            for (int g = 0; g < groups; ++g) {
                OSP_UNROLL
                for (int r = 0; r < 4; ++r)
                    sums[r] = sums[r] + load(table + (g * 16 + chosen[r * groups + g]) * kLanes);
            }
            OSP_UNROLL
            for (int r = 0; r < 4; ++r) store_first(y + (i + r) * power + j, sums[r], left);
        }
    }
}

void hadamard(const HadamardPlan& plan, float* x, float* scratch) {
    const int count = plan.base * plan.power;
    butterflies(x, plan.blocks * count, plan.power);
    const Floats scale = broadcast(plan.scale);
    for (int block = 0; block < plan.blocks; ++block, x += count) {
        if (plan.base > 1) {
            float* mixed = scratch + plan.base * 4 * kLanes;
            mix(plan, x, scratch, mixed);
            std::memcpy(x, mixed, static_cast<std::size_t>(count) * sizeof(float));
        }
        for (int i = 0; i < count; i += kLanes) store_first(x + i, load_first(x + i, count - i) * scale, count - i);
    }
}

void rotate(float* head, const float* cosine, const float* sine, int channels) {
    const int half = channels / 2;
    for (int i = 0; i < half; i += kLanes) {
        const int left = half - i;
        const Floats first = load_first(head + i, left), second = load_first(head + half + i, left);
        const Floats c = load_first(cosine + i, left), s = load_first(sine + i, left);
        store_first(head + i, first * c - second * s, left);
        store_first(head + half + i, second * c + first * s, left);
    }
}

std::int32_t argmax(const float* x, int width) {
    const Floats nothing = broadcast(-__builtin_inff());
    Floats best = nothing;
    Ints where = broadcast(std::int32_t{-1}), lost = {};
    for (int i = 0; i < width; i += kLanes) {
        const Ints index = indices(i);
        const Floats v = select(index < broadcast(width), load_first(x + i, width - i), nothing);
        lost = lost | is_nan(v);
        const Ints better = v > best;
        best = select(better, v, best);
        where = select(better, index, where);
    }
    const float highest = largest_of(best);
    if (any(lost) || !is_finite(highest)) return -1;
    float values[kLanes];
    std::int32_t places[kLanes], first = width;
    store(values, best);
    store(places, where);
    for (int lane = 0; lane < kLanes; ++lane)
        if (values[lane] == highest && places[lane] < first) first = places[lane];
    return first;
}

}  // namespace
}  // namespace osp
