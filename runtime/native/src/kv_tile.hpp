// Writes and reads one KV head's tile of 16 positions; `KvLayout` in kernel.hpp says what lies where.
#pragma once

#include "rows.hpp"

namespace osp {
namespace {

OSP_INLINE std::uint16_t to_bfloat16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7fc0;
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

OSP_INLINE float from_bfloat16(std::uint16_t half) {
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// The grid of one head of one token, as `quant.arithmetic.quantize_kv`.
struct Grid {
    float scale;  // NaN where the head holds a NaN or an infinity
    float zero;
};

Grid grid_of(const float* x, int channels, int bits) {
    Floats low = {}, high = {};
    Ints lost = {};
    for (int i = 0; i < channels; i += kLanes) {
        const Floats v = load_first(x + i, channels - i);
        lost = lost | is_nan(v);
        low = smaller(v, low);
        high = larger(v, high);
    }
    const float lowest = -largest_of(-low), highest = largest_of(high), levels = bits == 4 ? 15.0f : 255.0f;
    if (any(lost) || !is_finite(lowest) || !is_finite(highest)) return {__builtin_nanf(""), 0};
    if (lowest == 0 && highest == 0) return {1, 0};
    float scale = from_bfloat16(to_bfloat16(highest / levels - lowest / levels));
    scale = scale < kSmallestScale ? kSmallestScale : (scale > kLargestScale ? kLargestScale : scale);
    const float zero = __builtin_rintf(-lowest / scale);
    return {scale, zero < 0 ? 0 : (zero > levels ? levels : zero)};
}

// Codes of the first `count` of 16 channels; zeros where the grid is lost.
OSP_INLINE Ints kv_codes(const float* x, int count, Grid grid, float levels) {
    if (grid.scale != grid.scale) return Ints{};
    const Floats code = nearest(load_first(x, count) / broadcast(grid.scale)) + broadcast(grid.zero);
    return to_ints(smaller(larger(code, Floats{}), broadcast(levels)));
}

// Quantizes a head; its byte i, of channel i or of the channels i and i + C/2, goes to codes[i * stride].
void write_codes(const float* x, int channels, int bits, std::uint8_t* codes, int stride, std::uint8_t* scales,
                 std::uint8_t* zeros, int position) {
    const Grid grid = grid_of(x, channels, bits);
    const std::uint16_t scale = to_bfloat16(grid.scale);
    std::memcpy(scales + 2 * position, &scale, sizeof scale);
    zeros[position] = static_cast<std::uint8_t>(grid.zero);
    const int count = bits == 4 ? channels / 2 : channels;
    const float levels = bits == 4 ? 15.0f : 255.0f;
    for (int i = 0; i < count; i += kLanes) {
        const int left = count - i < kLanes ? count - i : kLanes;
        Ints some = kv_codes(x + i, left, grid, levels);
        if (bits == 4) some = some | kv_codes(x + count + i, left, grid, levels) << 4;
        std::uint8_t bytes[kLanes];
        store_bytes(bytes, some, kLanes);
        for (int j = 0; j < left; ++j) codes[(i + j) * stride] = bytes[j];
    }
}

void write_kv(const KvLayout& layout, std::uint8_t* tile, int position, const float* key, const float* value) {
    const int channels = layout.channels;
    std::uint8_t* values =
        tile + layout.values + static_cast<std::size_t>(position) * layout.padded_channels * layout.bits / 8;
    if (layout.bits == 16) {
        for (int c = 0; c < channels; ++c) {
            const std::uint16_t k = to_bfloat16(key[c]), v = to_bfloat16(value[c]);
            std::memcpy(tile + 2 * (c * kLanes + position), &k, sizeof k);
            std::memcpy(values + 2 * c, &v, sizeof v);
        }
        return;
    }
    write_codes(key, channels, layout.bits, tile + position, kLanes, tile + layout.key_scales, tile + layout.key_zeros,
                position);
    write_codes(value, channels, layout.bits, values, 1, tile + layout.value_scales, tile + layout.value_zeros,
                position);
}

}  // namespace
}  // namespace osp
