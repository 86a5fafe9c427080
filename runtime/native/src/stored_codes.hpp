// Codes of a checkpoint in numpy's arrays, on their way into a packed matrix: for the bindings.
#pragma once

#include <nanobind/ndarray.h>

#include <stdexcept>
#include <utility>
#include <vector>

#include "packed_matrix.hpp"

namespace osp {

using StoredCodes = nanobind::ndarray<nanobind::ro, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;
using CodeScales = nanobind::ndarray<const float, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

inline void require(bool fits, const char* what) {
    if (!fits) throw std::invalid_argument(what);
}

inline int extent(std::size_t size) {
    require(size <= 1u << 30, "an array is too large");
    return static_cast<int>(size);
}

inline PackedMatrix packed(Format format, const void* source, std::size_t rows, int columns,
                           std::vector<float> scales) {
    PackedMatrix matrix(format, extent(rows), columns, std::move(scales));
    for (int panel = 0; panel < matrix.panels(); ++panel) matrix.pack_panel(panel, source);
    return matrix;
}

// `stored`: uint8 [M, ceil(K / 2)] of `quant.arithmetic.pack`, or int8 [M, K]; `scale`: [1] or [M].
inline PackedMatrix packed_codes(const StoredCodes& stored, int columns, int bits, const CodeScales& scale) {
    require(bits == 4 || bits == 8, "codes have 4 or 8 bits");
    require(columns > 0 && stored.itemsize() == 1, "codes are stored as bytes, for at least one column");
    const int width = bits == 4 ? columns / 2 + columns % 2 : columns;
    require(stored.shape(1) == static_cast<std::size_t>(width), "the stored codes are not of so many columns");
    return packed(bits == 4 ? Format::kInt4 : Format::kInt8, stored.data(), stored.shape(0), columns,
                  {scale.data(), scale.data() + scale.size()});
}

}  // namespace osp
