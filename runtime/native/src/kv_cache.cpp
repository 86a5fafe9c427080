#include "kv_cache.hpp"

#include <cstring>
#include <stdexcept>
#include <string>

namespace osp {
namespace {

std::size_t aligned(std::size_t bytes) { return (bytes + 15) / 16 * 16; }

KvLayout layout_of(int channels, int bits) {
    if (bits != 16 && bits != 8 && bits != 4)
        throw std::invalid_argument("keys and values have 16, 8 or 4 bits, not " + std::to_string(bits));
    if (channels < 2 || channels % 2 != 0)
        throw std::invalid_argument("a head has an even number of channels, not " + std::to_string(channels));
    const int step = bits == 4 ? 2 * kLanes : kLanes;
    KvLayout layout = {};
    layout.bits = bits;
    layout.channels = channels;
    layout.padded_channels = (channels + step - 1) / step * step;
    const auto plane = [&](int wide) { return static_cast<std::size_t>(wide) * kLanes * bits / 8; };
    const std::size_t scales = bits == 16 ? 0 : 2 * kLanes, zeros = bits == 16 ? 0 : kLanes;
    layout.key_scales = aligned(plane(channels));
    layout.key_zeros = layout.key_scales + scales;
    layout.values = layout.key_zeros + zeros;
    layout.value_scales = layout.values + aligned(plane(layout.padded_channels));
    layout.value_zeros = layout.value_scales + scales;
    layout.bytes = layout.value_zeros + zeros;
    return layout;
}

}  // namespace

KvCache::KvCache(int layers, int heads, int channels, int bits, int blocks)
    : layers_(layers), heads_(heads), blocks_(blocks), layout_(layout_of(channels, bits)) {
    if (layers < 1 || heads < 1 || blocks < 1) throw std::invalid_argument("a KV cache of nothing");
    const std::size_t tiles =
        static_cast<std::size_t>(layers) * static_cast<std::size_t>(heads) * static_cast<std::size_t>(blocks);
    data_ =
        Buffer(tiles * block_stride(), Pages::kSmall);  // a token writes a little for each layer and head, far apart
}

std::uint8_t* KvCache::tiles(int layer, int head) const {
    const auto before = static_cast<std::size_t>(layer * heads_ + head) * static_cast<std::size_t>(blocks_);
    return data_.data() + before * block_stride();
}

void KvCache::copy(int source, int target) {
    for (int layer = 0; layer < layers_; ++layer)
        for (int head = 0; head < heads_; ++head) {
            std::uint8_t* first = tiles(layer, head);
            std::memcpy(first + static_cast<std::size_t>(target) * block_stride(),
                        first + static_cast<std::size_t>(source) * block_stride(), block_stride());
        }
}

}  // namespace osp
