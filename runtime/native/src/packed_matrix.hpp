// A weight matrix [M, K] in panels, as kernels read it (`Panels` in kernel.hpp), and its way there from a checkpoint.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.hpp"
#include "kernel.hpp"

namespace osp {

class PackedMatrix {
  public:
    PackedMatrix() = default;
    // Zeros. `scales`: [1] or [M] for integer formats, empty for floats.
    // Throws std::invalid_argument where a size is not positive or the scales do not fit; std::bad_alloc.
    PackedMatrix(Format format, int rows, int columns, std::vector<float> scales);

    int rows() const { return rows_; }
    int columns() const { return columns_; }
    int panels() const { return (rows_ + kLanes - 1) / kLanes; }
    Format format() const { return panels_.format; }
    Panels view() const { return panels_; }
    // Bytes of one panel, and of all there is.
    std::size_t panel_bytes() const { return panels_.panel_bytes; }
    std::size_t bytes() const { return data_.size() + scales_.size(); }

    // Packs one panel from the whole matrix: int4 codes two a byte, low nibble first, [M, ceil(K/2)]; int8 [M, K];
    // bfloat16 [M, K]; float32 [M, K]. Different panels may be packed by different threads.
    void pack_panel(int panel, const void* source);
    // Fills a panel with codes or small floats that depend on the seed and the panel only.
    void randomize_panel(int panel, std::uint64_t seed);

    // The row dequantized, [K]: what an embedding looks up.
    void read_row(int row, float* to) const;

  private:
    std::uint8_t* panel_data(int panel) const { return data_.data() + static_cast<std::size_t>(panel) * panel_bytes(); }

    int rows_ = 0, columns_ = 0;
    Buffer data_, scales_;
    Panels panels_ = {};
};

}  // namespace osp
