#include "packed_linear.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "activations.hpp"

namespace osp {
namespace {

constexpr int kRowsOfTile = 4;         // rows that a chunk prepares
constexpr int kRowsOfBlock = 256;      // rows that meet a panel while it is in the cache, and they with it
constexpr int kOutputsOfChunk = 1024;  // rows times panels
constexpr int kChunksOfThread = 4;

void widen(const std::uint16_t* from, int count, float* to) {
    for (int i = 0; i < count; ++i) {
        const std::uint32_t bits = static_cast<std::uint32_t>(from[i]) << 16;
        std::memcpy(to + i, &bits, sizeof bits);
    }
}

// To the nearest bfloat16, ties to even. Without a branch, so that a compiler takes several numbers at once.
void narrow(const float* __restrict from, int count, std::uint16_t* __restrict to) {
    for (int i = 0; i < count; ++i) {
        std::uint32_t bits;
        std::memcpy(&bits, from + i, sizeof bits);
        const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
        const std::uint32_t nan = (bits & 0x7fffffffu) > 0x7f800000u ? 0xffffffffu : 0;
        to[i] = static_cast<std::uint16_t>((rounded & ~nan) | (0x7fc0u & nan));
    }
}

std::size_t bytes_of(Number type) { return type == Number::kFloat32 ? 4 : 2; }

// A chunk of prepared rows in scratch: floats, then codes, sums and scales.
struct Tile {
    Tile(std::byte* scratch, int stride)
        : floats(reinterpret_cast<float*>(scratch)),
          codes(reinterpret_cast<std::int8_t*>(floats + kRowsOfTile * stride)),
          sums(reinterpret_cast<std::int32_t*>(codes + kRowsOfTile * stride)),
          scales(reinterpret_cast<float*>(sums + kRowsOfTile)) {}
    static std::size_t bytes(int stride) { return lines(static_cast<std::size_t>(kRowsOfTile) * (5 * stride + 8)); }

    float* floats;
    std::int8_t* codes;
    std::int32_t* sums;
    float* scales;
};

}  // namespace

struct PackedLinear::Prepared {
    int count, stride;
    std::int8_t* codes;
    std::int32_t* sums;
    float *scales, *floats;

    CodeRows code_rows(int first, int rows) const {
        return {rows, static_cast<std::size_t>(stride), codes + static_cast<std::ptrdiff_t>(first) * stride,
                sums + first, scales + first};
    }
    FloatRows float_rows(int first, int rows) const {
        return {rows, static_cast<std::size_t>(stride), floats + static_cast<std::ptrdiff_t>(first) * stride};
    }
};

PackedLinear::PackedLinear(std::shared_ptr<Team> team, const Kernel& kernel, PackedMatrix matrix, InputScheme inputs)
    : team_(std::move(team)), kernel_(kernel), matrix_(std::move(matrix)), inputs_(std::move(inputs)) {
    if (inputs_.bits != 4 && inputs_.bits != 8 && inputs_.bits != 16)
        throw std::invalid_argument("inputs have 4, 8 or 16 bits, not " + std::to_string(inputs_.bits));
    if (inputs_.scale && (inputs_.bits == 16 || !std::isfinite(*inputs_.scale) || *inputs_.scale <= 0))
        throw std::invalid_argument("an input scale is a positive number, and inputs of 16 bits have none");
    if (inputs_.hadamard && inputs_.hadamard.width() != matrix_.columns())
        throw std::invalid_argument("a Hadamard transform of " + std::to_string(inputs_.hadamard.width()) +
                                    " channels for " + std::to_string(matrix_.columns()) + " inputs");
}

void PackedLinear::forward(const void* x, Number x_type, int rows, void* y, Number y_type) const {
    if (rows == 0) return;
    const auto lock = team_->lock();
    const Prepared input = prepared(rows);
    team_->run({prepare(x, x_type, input), product(input, y, y_type)}, scratch_bytes(rows));
}

void PackedLinear::multiply(const std::int8_t* codes, const float* scales, int rows, void* y, Number y_type) const {
    if (inputs_.bits == 16) throw std::invalid_argument("the inputs of this layer have no codes");
    if (rows == 0) return;
    const auto lock = team_->lock();
    const Prepared input = prepared(rows);
    team_->run({prepare(codes, scales, input), product(input, y, y_type)}, scratch_bytes(rows));
}

PackedLinear::Prepared PackedLinear::prepared(int rows) const {
    const int stride = stride_of(matrix_.columns());
    const auto count = static_cast<std::size_t>(rows), cells = count * static_cast<std::size_t>(stride);
    if (inputs_.bits == 16)
        return {rows,    stride,  nullptr,
                nullptr, nullptr, reinterpret_cast<float*>(team_->memory(cells * sizeof(float)))};
    std::uint8_t* at = team_->memory(lines(cells) + 2 * lines(4 * count));
    auto* sums = reinterpret_cast<std::int32_t*>(at + lines(cells));
    auto* scales = reinterpret_cast<float*>(at + lines(cells) + lines(4 * count));
    return {rows, stride, reinterpret_cast<std::int8_t*>(at), sums, scales, nullptr};
}

Phase PackedLinear::prepare(const void* x, Number type, const Prepared& rows) const {
    const int width = matrix_.columns(), padded = (width + kColumnStep - 1) / kColumnStep * kColumnStep;
    const auto row_bytes = static_cast<std::size_t>(width) * bytes_of(type);
    const HadamardPlan transform = inputs_.hadamard ? inputs_.hadamard.plan() : HadamardPlan{};
    const auto compute = [=, this](int chunk, std::byte* scratch) {
        const Tile tile(scratch, rows.stride);
        auto* room = reinterpret_cast<float*>(scratch + Tile::bytes(rows.stride));
        const int first = chunk * kRowsOfTile, count = std::min(kRowsOfTile, rows.count - first);
        for (int i = 0; i < count; ++i) {
            const auto* from = static_cast<const std::byte*>(x) + static_cast<std::size_t>(first + i) * row_bytes;
            float* floats = tile.floats + i * rows.stride;
            std::int8_t* codes = tile.codes + i * rows.stride;
            if (type == Number::kBfloat16)
                widen(reinterpret_cast<const std::uint16_t*>(from), width, floats);
            else
                std::memcpy(floats, from, row_bytes);
            if (inputs_.hadamard) kernel_.hadamard(transform, floats, room);
            if (inputs_.bits == 16)
                std::fill(floats + width, floats + padded, 0.0f);
            else if (inputs_.scale)
                kernel_.quantize_static(floats, width, padded, *inputs_.scale, inputs_.bits, codes, tile.sums + i,
                                        tile.scales + i);
            else
                kernel_.quantize_token(floats, width, padded, inputs_.bits, codes, tile.sums + i, tile.scales + i);
        }
    };
    const auto commit = [=, this](int chunk, const std::byte* scratch) {
        const Tile tile(const_cast<std::byte*>(scratch), rows.stride);
        const int first = chunk * kRowsOfTile, count = std::min(kRowsOfTile, rows.count - first);
        const auto at = static_cast<std::ptrdiff_t>(first) * rows.stride;
        if (inputs_.bits == 16) {
            std::copy_n(tile.floats, count * rows.stride, rows.floats + at);
            return;
        }
        std::copy_n(tile.codes, count * rows.stride, rows.codes + at);
        std::copy_n(tile.sums, count, rows.sums + first);
        std::copy_n(tile.scales, count, rows.scales + first);
    };
    return {(rows.count + kRowsOfTile - 1) / kRowsOfTile, compute, commit};
}

Phase PackedLinear::prepare(const std::int8_t* codes, const float* scales, const Prepared& rows) const {
    const int width = matrix_.columns(), padded = (width + kColumnStep - 1) / kColumnStep * kColumnStep;
    const auto compute = [](int, std::byte*) {};
    const auto commit = [=](int chunk, const std::byte*) {
        for (int n = chunk * kRowsOfTile; n < std::min(rows.count, (chunk + 1) * kRowsOfTile); ++n) {
            const std::int8_t* from = codes + static_cast<std::ptrdiff_t>(n) * width;
            std::int8_t* to = rows.codes + static_cast<std::ptrdiff_t>(n) * rows.stride;
            std::int32_t sum = 0;
            for (int k = 0; k < width; ++k) sum += to[k] = from[k];
            std::fill(to + width, to + padded, std::int8_t{0});
            rows.sums[n] = sum;
            rows.scales[n] = scales[n];
        }
    };
    return {(rows.count + kRowsOfTile - 1) / kRowsOfTile, compute, commit};
}

Phase PackedLinear::product(const Prepared& rows, void* y, Number type) const {
    const int panels = matrix_.panels(), block = std::min(rows.count, kRowsOfBlock);
    const int blocks = (rows.count + block - 1) / block;
    const int least = block >= 24 ? 2 : 1;  // kernels take two panels at a time where there are many rows
    const int most = std::max(least, kOutputsOfChunk / block);
    const int step = std::clamp(panels / (team_->threads() * kChunksOfThread), least, most);
    const int runs = (panels + step - 1) / step;
    // The panels of a chunk within a block, and the rows of the block.
    const auto place = [=](int chunk) {
        const int first = chunk % runs * step, row = chunk / runs * block;
        return std::array{first, std::min(step, panels - first), row, std::min(block, rows.count - row)};
    };
    const auto compute = [=, this](int chunk, std::byte* scratch) {
        const auto [first, count, row, height] = place(chunk);
        auto* outputs = reinterpret_cast<float*>(scratch);
        const auto stride = static_cast<std::size_t>(count * kLanes);
        if (inputs_.bits == 16)
            kernel_.float_product(rows.float_rows(row, height), matrix_.view(), first, count, outputs, stride);
        else
            kernel_.integer_product(rows.code_rows(row, height), matrix_.view(), first, count, outputs, stride);
    };
    const auto commit = [=, this](int chunk, const std::byte* scratch) {
        const auto [first, count, row, height] = place(chunk);
        const std::size_t size = bytes_of(type), outputs = static_cast<std::size_t>(matrix_.rows());
        const auto from = static_cast<std::size_t>(first * kLanes);
        const std::size_t width = std::min(static_cast<std::size_t>(count * kLanes), outputs - from);
        const auto* floats = reinterpret_cast<const float*>(scratch);
        for (int n = 0; n < height; ++n, floats += count * kLanes) {
            std::byte* to = static_cast<std::byte*>(y) + (static_cast<std::size_t>(row + n) * outputs + from) * size;
            if (type == Number::kBfloat16)
                narrow(floats, static_cast<int>(width), reinterpret_cast<std::uint16_t*>(to));
            else
                std::memcpy(to, floats, width * size);
        }
    };
    return {blocks * runs, compute, commit};
}

std::size_t PackedLinear::scratch_bytes(int rows) const {
    const int block = std::min(rows, kRowsOfBlock), width = matrix_.columns();
    const std::size_t multiplying =
        sizeof(float) * kLanes * static_cast<std::size_t>(std::max(kOutputsOfChunk, 2 * block));
    // Of a transform's base there is no more than its width.
    const auto room = hadamard_scratch(std::min(width, kLargestBase), 1) + static_cast<std::size_t>(width);
    return std::max(multiplying, Tile::bytes(stride_of(width)) + lines(room * sizeof(float)));
}

}  // namespace osp
