#include "packed_matrix.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace osp {
namespace {

constexpr std::uint32_t kInt4Bias = 0x88888888u;  // codes + 8 of eight codes at once: the sign bit of each flips
constexpr std::uint32_t kInt8Bias = 0x80808080u;

bool is_integer(Format format) { return format == Format::kInt4 || format == Format::kInt8; }

std::size_t column_bytes(Format format, int columns) {  // of 16 outputs
    const auto k = static_cast<std::size_t>(columns);
    switch (format) {
        case Format::kInt4:
            return k * kLanes / 2;
        case Format::kInt8:
            return k * kLanes;
        case Format::kBfloat16:
            return k * kLanes * 2;
        case Format::kFloat32:
            return k * kLanes * 4;
    }
    throw std::invalid_argument("unknown format");
}

// Four nibbles from the low half of a word to the low nibbles of its four bytes.
std::uint32_t spread(std::uint32_t nibbles) {
    nibbles = (nibbles | nibbles << 8) & 0x00ff00ffu;
    return (nibbles | nibbles << 4) & 0x0f0f0f0fu;
}

// Splits a byte row of up to `count` bytes into words, zero beyond its end.
std::uint32_t word_at(const std::uint8_t* row, std::size_t at, std::size_t count) {
    std::uint32_t word = 0;
    if (at < count) std::memcpy(&word, row + at, std::min<std::size_t>(sizeof word, count - at));
    return word;
}

std::uint64_t mixed(std::uint64_t x) {  // SplitMix64's finalizer, Steele et al. 2014
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

}  // namespace

PackedMatrix::PackedMatrix(Format format, int rows, int columns, std::vector<float> scales)
    : rows_(rows), columns_(columns) {
    if (rows < 1 || columns < 1)
        throw std::invalid_argument("a matrix of " + std::to_string(rows) + " x " + std::to_string(columns));
    const bool integer = is_integer(format);
    if (integer ? scales.size() != 1 && scales.size() != static_cast<std::size_t>(rows) : !scales.empty())
        throw std::invalid_argument(std::to_string(scales.size()) + " scales for a matrix of " + std::to_string(rows) +
                                    " outputs");
    const int padded = integer ? (columns + kColumnStep - 1) / kColumnStep * kColumnStep : columns;
    panels_.format = format;
    panels_.columns = padded;
    panels_.panel_bytes = lines(column_bytes(format, padded));
    panels_.scale_per_output = scales.size() > 1;
    data_ = Buffer(panels_.panel_bytes * static_cast<std::size_t>(panels()), Pages::kShared);
    panels_.data = data_.data();
    if (integer) {
        const std::size_t values = panels_.scale_per_output ? static_cast<std::size_t>(panels()) * kLanes : 1;
        scales_ = Buffer(values * sizeof(float), Pages::kShared);
        std::copy(scales.begin(), scales.end(), scales_.as<float>());
        panels_.scales = scales_.as<float>();
    }
}

void PackedMatrix::pack_panel(int panel, const void* source) {
    const auto* from = static_cast<const std::uint8_t*>(source);
    std::uint8_t* to = panel_data(panel);
    const int first = panel * kLanes, present = std::min(kLanes, rows_ - first);
    const auto padded = static_cast<std::size_t>(panels_.columns), columns = static_cast<std::size_t>(columns_);
    const Format format = panels_.format;
    if (is_integer(format)) {
        const bool four_bits = format == Format::kInt4;
        const std::size_t row_bytes = four_bits ? (columns + 1) / 2 : columns;
        const std::size_t words = padded / (four_bits ? 8 : 4);
        for (int r = 0; r < kLanes; ++r) {
            const std::uint8_t* row = from + static_cast<std::size_t>(first + r) * row_bytes;
            for (std::size_t i = 0; i < words; ++i) {
                std::uint32_t word = r < present ? word_at(row, 4 * i, row_bytes) : 0;
                word = four_bits ? (spread(word & 0xffffu) | spread(word >> 16) << 4) ^ kInt4Bias : word ^ kInt8Bias;
                std::memcpy(to + 64 * i + 4 * r, &word, sizeof word);
            }
        }
        return;
    }
    const std::size_t size = format == Format::kBfloat16 ? 2 : 4;
    for (int r = 0; r < present; ++r) {
        const std::uint8_t* row = from + static_cast<std::size_t>(first + r) * columns * size;
        for (std::size_t k = 0; k < columns; ++k) std::memcpy(to + (k * kLanes + r) * size, row + k * size, size);
    }
}

void PackedMatrix::randomize_panel(int panel, std::uint64_t seed) {
    std::uint8_t* to = panel_data(panel);
    const std::uint64_t start = mixed(seed) + static_cast<std::uint64_t>(panel) * panels_.panel_bytes;
    for (std::size_t i = 0; i < panels_.panel_bytes; i += 8) {
        std::uint64_t word = mixed(start + i);
        // As floats: random signs and mantissas under one exponent, so that values lie between 2^-7 and 2^-6.
        if (panels_.format == Format::kBfloat16) word = (word & 0x807f807f807f807fu) | 0x3c003c003c003c00u;
        if (panels_.format == Format::kFloat32) word = (word & 0x807fffff807fffffu) | 0x3c0000003c000000u;
        std::memcpy(to + i, &word, std::min<std::size_t>(sizeof word, panels_.panel_bytes - i));
    }
}

void PackedMatrix::read_row(int row, float* to) const {
    const std::uint8_t* panel = panel_data(row / kLanes);
    const int r = row % kLanes;
    const float scale = panels_.scales == nullptr ? 1.0f : panels_.scales[panels_.scale_per_output ? row : 0];
    for (int k = 0; k < columns_; ++k) {
        switch (panels_.format) {
            case Format::kInt4: {
                const int both = panel[64 * (k / 8) + 4 * r + k % 4];
                to[k] = static_cast<float>((k % 8 < 4 ? both & 15 : both >> 4) - 8) * scale;
                break;
            }
            case Format::kInt8:
                to[k] = static_cast<float>(panel[16 * (k - k % 4) + 4 * r + k % 4] - 128) * scale;
                break;
            case Format::kBfloat16: {
                std::uint16_t half;
                std::memcpy(&half, panel + 2 * (k * kLanes + r), sizeof half);
                const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
                std::memcpy(to + k, &bits, sizeof bits);
                break;
            }
            case Format::kFloat32:
                std::memcpy(to + k, panel + 4 * (k * kLanes + r), sizeof(float));
                break;
        }
    }
}

}  // namespace osp
