// Products of float rows with packed matrices: one chain of fused multiply-adds over k for each output, lanes being
// the 16 outputs of a panel. So the bits do not depend on how many rows or panels are computed together.
#pragma once

#include "tiles.hpp"

namespace osp {
namespace {

// The weights of 16 outputs at column k.
template <Format format>
OSP_INLINE Floats weights_at(const std::uint8_t* panel, int k) {
    if constexpr (format == Format::kBfloat16) return load_bfloat16(panel + 2 * kLanes * k);
    if constexpr (format == Format::kFloat32) return load<Floats>(panel + 4 * kLanes * k);
    if constexpr (format == Format::kInt4) {
        const Ints eight = load<Ints>(panel + 64 * (k / 8));
        return to_floats((eight >> (8 * (k % 4) + (k % 8 < 4 ? 0 : 4)) & broadcast(15)) - broadcast(8));
    }
    if constexpr (format == Format::kInt8) {
        const Ints four = load<Ints>(panel + 64 * (k / 4));
        return to_floats((four >> (8 * (k % 4)) & broadcast(255)) - broadcast(128));
    }
}

template <Format format>
struct FloatTiles {
    template <int rows, int panels>
    static void tile(const FloatRows& x, int row, const Panels& w, int first_panel, float* y, std::size_t y_stride) {
        constexpr int step = format == Format::kBfloat16 || format == Format::kFloat32 ? 1 : kColumnStep;
        const std::uint8_t* panel = panel_of(w, first_panel);
        const float* values = x.values + static_cast<std::size_t>(row) * x.stride;
        Floats sums[rows][panels] = {};
        for (int start = 0; start < w.columns; start += step) {
            OSP_UNROLL
            for (int k = start; k < start + step; ++k) {
                OSP_UNROLL
                for (int p = 0; p < panels; ++p) {
                    const Floats weights = weights_at<format>(panel + p * w.panel_bytes, k);
                    OSP_UNROLL
                    for (int n = 0; n < rows; ++n)
                        sums[n][p] = multiply_add(weights, broadcast(values[n * x.stride + k]), sums[n][p]);
                }
            }
        }
        OSP_UNROLL
        for (int p = 0; p < panels; ++p) {
            const Floats scales = output_scales(w, first_panel + p);
            OSP_UNROLL
            for (int n = 0; n < rows; ++n) store(y + n * y_stride + p * kLanes, sums[n][p] * scales);
        }
    }
};

template <Format format>
void float_format(const FloatRows& x, const Panels& w, int first_panel, int count, float* y, std::size_t y_stride) {
    using Tiles = FloatTiles<format>;
    int done = 0;
    if constexpr (kVectors >= 32) {
        done = cover<Tiles, 8, 2>(x, done, w, first_panel, count, y, y_stride);
        done = cover<Tiles, 4, 2>(x, done, w, first_panel, count, y, y_stride);
        done = cover<Tiles, 2, 4>(x, done, w, first_panel, count, y, y_stride);
        cover<Tiles, 1, 4>(x, done, w, first_panel, count, y, y_stride);
    } else if constexpr (kVectors >= 8) {
        done = cover<Tiles, 6, 1>(x, done, w, first_panel, count, y, y_stride);
        done = cover<Tiles, 2, 2>(x, done, w, first_panel, count, y, y_stride);
        cover<Tiles, 1, 4>(x, done, w, first_panel, count, y, y_stride);
    } else {
        done = cover<Tiles, 2, 1>(x, done, w, first_panel, count, y, y_stride);
        cover<Tiles, 1, 2>(x, done, w, first_panel, count, y, y_stride);
    }
}

void float_product(const FloatRows& x, const Panels& w, int first_panel, int count, float* y, std::size_t y_stride) {
    switch (w.format) {
        case Format::kInt4:
            return float_format<Format::kInt4>(x, w, first_panel, count, y, y_stride);
        case Format::kInt8:
            return float_format<Format::kInt8>(x, w, first_panel, count, y, y_stride);
        case Format::kBfloat16:
            return float_format<Format::kBfloat16>(x, w, first_panel, count, y, y_stride);
        case Format::kFloat32:
            return float_format<Format::kFloat32>(x, w, first_panel, count, y, y_stride);
    }
}

}  // namespace
}  // namespace osp
