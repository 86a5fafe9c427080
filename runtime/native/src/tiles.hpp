// Cuts a matrix product into tiles of rows by panels that fit into registers.
#pragma once

#include "lanes.hpp"

namespace osp {
namespace {

// Tiles of `rows` rows by `panels` panels from row `done` on, while there are so many rows; single panels at the edge.
// `Tiles::tile<rows, panels>` computes one of them. Returns the first row that is left.
template <typename Tiles, int rows, int panels, typename Rows>
int cover(const Rows& x, int done, const Panels& w, int first_panel, int count, float* y, std::size_t y_stride) {
    for (; done + rows <= x.count; done += rows) {
        float* to = y + static_cast<std::size_t>(done) * y_stride;
        int p = 0;
        for (; p + panels <= count; p += panels)
            Tiles::template tile<rows, panels>(x, done, w, first_panel + p, to + p * kLanes, y_stride);
        if constexpr (panels > 1)
            for (; p < count; ++p)
                Tiles::template tile<rows, 1>(x, done, w, first_panel + p, to + p * kLanes, y_stride);
    }
    return done;
}

// Rows by panels of a tile.
template <int rows, int panels>
struct Size {};

// `Kernel::integer_product` by `Tiles<format>`: tiles of the first size while there are so many rows, then of the next.
// The last size has one row.
template <template <Format> typename Tiles, typename... Sizes>
void integer_product(const CodeRows& x, const Panels& w, int first_panel, int count, float* y, std::size_t y_stride) {
    int done = 0;
    const auto with = [&]<typename FormatTiles, int rows, int panels>(FormatTiles, Size<rows, panels>) {
        done = cover<FormatTiles, rows, panels>(x, done, w, first_panel, count, y, y_stride);
    };
    if (w.format == Format::kInt4)
        (with(Tiles<Format::kInt4>{}, Sizes{}), ...);
    else
        (with(Tiles<Format::kInt8>{}, Sizes{}), ...);
}

OSP_INLINE const std::uint8_t* panel_of(const Panels& w, int panel) {
    return w.data + static_cast<std::size_t>(panel) * w.panel_bytes;
}

// The scales of a panel's outputs; 1 for floats.
OSP_INLINE Floats output_scales(const Panels& w, int panel) {
    if (w.scales == nullptr) return broadcast(1.0f);
    return w.scale_per_output ? load(w.scales + panel * kLanes) : broadcast(w.scales[0]);
}

template <Format format>
constexpr int kBias = format == Format::kInt4 ? 8 : 128;
// Bytes of a panel for 8 columns.
template <Format format>
constexpr std::size_t kGroupBytes = format == Format::kInt4 ? 64 : 128;

// -bias times the sum of a row's codes, modulo 2^32 like all sums of products: what they start from.
template <Format format>
OSP_INLINE std::int32_t offset_of(const CodeRows& x, int row) {
    return static_cast<std::int32_t>(0u - static_cast<std::uint32_t>(kBias<format>) *
                                              static_cast<std::uint32_t>(x.sums[row]));
}

// y = float(sums) * (row scale * output scales), for 16 outputs.
OSP_INLINE void write_outputs(Ints sums, const CodeRows& x, int row, const Panels& w, int panel, float* y) {
    store(y, to_floats(sums) * (broadcast(x.scales[row]) * output_scales(w, panel)));
}

// Leaves a vector as it is, in a register, and unknown to the compiler.
template <typename Vector>
OSP_INLINE void keep(Vector& v) {
#if defined(__aarch64__)
    asm volatile("" : "+w"(v));
#else
    asm volatile("" : "+v"(v));
#endif
}

// `rounds` times `dot(sum, weights, inputs)` on `chains` sums, all of it in registers.
template <int chains, typename Sum, typename Weights, typename Inputs, typename Dot>
OSP_INLINE void repeat_dots(int rounds, Dot dot) {
    Sum sums[chains] = {};
    Weights weights = {};
    Inputs inputs = {};
    for (int round = 0; round < rounds; ++round) {
        OSP_UNROLL
        for (int c = 0; c < chains; ++c) {
            keep(weights), keep(inputs);
            dot(sums[c], weights, inputs);
            keep(sums[c]);
        }
    }
}

}  // namespace
}  // namespace osp
