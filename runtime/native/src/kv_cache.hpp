// Keys and values of all layers, in blocks of 16 positions, each KV head's in a tile of its own (`KvLayout`).
#pragma once

#include <cstddef>
#include <cstdint>

#include "buffer.hpp"
#include "kernel.hpp"

namespace osp {

class KvCache {
  public:
    // Throws std::invalid_argument for bits other than 16, 8 and 4 or an odd number of channels, std::bad_alloc.
    KvCache(int layers, int heads, int channels, int bits, int blocks);

    const KvLayout& layout() const { return layout_; }
    int blocks() const { return blocks_; }
    std::size_t bytes() const { return data_.size(); }
    // From one block to the next, of one layer and head: side by side, since attention reads them one after another.
    std::size_t block_stride() const { return layout_.bytes; }
    // The tile of block 0.
    std::uint8_t* tiles(int layer, int head) const;
    // Copies a block, in every layer.
    void copy(int source, int target);

  private:
    int layers_, heads_, blocks_;
    KvLayout layout_;
    Buffer data_;
};

}  // namespace osp
