// What a step computes with: one buffer for each kind of activation, for the most rows that a step may have.
#pragma once

#include "buffer.hpp"
#include "weights.hpp"

namespace osp {

// Whole vectors, and not a multiple of 1,024: rows that lie a multiple of a page apart compete for few lines of the cache.
constexpr int stride_of(int width) {
    const int whole = (width + kLanes - 1) / kLanes * kLanes;
    return whole % 1024 == 0 ? whole + kLanes : whole;
}

// Rows of floats, [rows, stride]. What lies between the width and the stride is zero and stays so.
struct FloatPlane {
    FloatPlane(int rows, int width)
        : width(width),
          stride(stride_of(width)),
          memory(static_cast<std::size_t>(rows) * static_cast<std::size_t>(stride) * sizeof(float)) {}
    float* row(int n) const {
        return memory.as<float>() + static_cast<std::size_t>(n) * static_cast<std::size_t>(stride);
    }

    int width, stride;
    Buffer memory;
};

// The input of linear layers: as floats, and as codes.
struct InputPlane {
    InputPlane(int rows, int width)
        : floats(rows, width),
          codes(static_cast<std::size_t>(rows) * static_cast<std::size_t>(floats.stride)),
          sums(static_cast<std::size_t>(rows) * sizeof(std::int32_t)),
          scales(static_cast<std::size_t>(rows) * sizeof(float)) {}
    std::int8_t* codes_of(int n) const {
        return codes.as<std::int8_t>() + static_cast<std::size_t>(n) * static_cast<std::size_t>(floats.stride);
    }
    CodeRows code_rows(int first, int count) const {
        return {count, static_cast<std::size_t>(floats.stride), codes_of(first), sums.as<std::int32_t>() + first,
                scales.as<float>() + first};
    }
    FloatRows float_rows(int first, int count) const {
        return {count, static_cast<std::size_t>(floats.stride), floats.row(first)};
    }

    FloatPlane floats;
    Buffer codes, sums, scales;
};

}  // namespace osp
