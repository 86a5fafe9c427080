// The phases of a step that know positions and the cache: rotary embedding, keys and values, attention.
#include <algorithm>
#include <memory>

#include "step.hpp"

namespace osp {

constexpr int kPositionsOfTile = 2048;  // a chunk takes more heads while these times positions are fewer

void StepBuilder::place(int layer) {
    const Shape& shape = model_.shape_;
    Model::Activations& a = activations_;
    const int count = rows_, width = shape.queries() + shape.keys();
    const Hadamard& transform = model_.weights_.queries_and_keys;
    const bool transformed = static_cast<bool>(transform);
    const HadamardPlan hadamard = transformed ? transform.plan() : HadamardPlan{};
    const Kernel& kernel = kernel_;
    const auto compute = [=, &a, &kernel](int chunk, std::byte* scratch) {
        auto* row = reinterpret_cast<float*>(scratch);
        float* room = row + static_cast<std::size_t>(width) * kRowsOfTile;
        for (int n = chunk * kRowsOfTile; n < std::min(count, (chunk + 1) * kRowsOfTile); ++n, row += width) {
            std::copy_n(a.queries.row(n), shape.queries(), row);
            std::copy_n(a.keys.row(n), shape.keys(), row + shape.queries());
            for (float* head = row; head < row + width; head += shape.head_dim) {
                kernel.rotate(head, a.cosine.row(n), a.sine.row(n), shape.head_dim);
                if (transformed) kernel.hadamard(hadamard, head, room);
            }
        }
    };
    const KvCache& cache = model_.cache_;
    const auto commit = [=, plan = plan_, &a, &kernel, &cache](int chunk, const std::byte* scratch) {
        const auto* row = reinterpret_cast<const float*>(scratch);
        for (int n = chunk * kRowsOfTile; n < std::min(count, (chunk + 1) * kRowsOfTile); ++n, row += width) {
            std::copy_n(row, shape.queries(), a.queries.row(n));
            const int position = plan->position[static_cast<std::size_t>(n)];
            const Slice& slice =
                plan->batch.slices[static_cast<std::size_t>(plan->slice_of[static_cast<std::size_t>(n)])];
            const auto block = static_cast<std::size_t>(slice.block_table[static_cast<std::size_t>(position / kLanes)]);
            for (int head = 0; head < shape.kv_heads; ++head)
                kernel.write_kv(cache.layout(), cache.tiles(layer, head) + block * cache.block_stride(),
                                position % kLanes, row + shape.queries() + head * shape.head_dim,
                                a.values.row(n) + head * shape.head_dim);
        }
    };
    phases_.push_back({(count + kRowsOfTile - 1) / kRowsOfTile, compute, commit});
}

std::vector<StepBuilder::AttentionTile> StepBuilder::attention_tiles() const {
    const int kv_heads = model_.shape_.kv_heads;
    const bool narrowed = residual_ == &activations_.narrowed;
    std::vector<AttentionTile> tiles;
    int row = 0, out_row = 0;
    for (std::size_t s = 0; s < plan_->batch.slices.size(); ++s) {
        const Slice& slice = plan_->batch.slices[s];
        const int positions = slice.start + slice.length;
        const int enough = std::max(1, kv_heads / (2 * model_.threads()));
        const int heads = std::clamp(kPositionsOfTile / positions, 1, slice.length > 1 ? 1 : enough);
        const int skipped = narrowed ? slice.length - slice.logits : 0;
        for (int from = skipped; from < slice.length; from += kTokensOfTile)
            for (int head = 0; head < kv_heads; head += heads)
                tiles.push_back({static_cast<int>(s), row + from, slice.start + from,
                                 std::min(kTokensOfTile, slice.length - from), head, std::min(heads, kv_heads - head),
                                 out_row + from - skipped});
        row += slice.length;
        out_row += slice.length - skipped;
    }
    return tiles;
}

void StepBuilder::attend(int layer) {
    const Shape& shape = model_.shape_;
    Model::Activations& a = activations_;
    const int group = shape.heads / shape.kv_heads, channels = group * shape.head_dim;
    const Kernel& kernel = kernel_;
    const KvCache& cache = model_.cache_;
    const auto tiles = std::make_shared<const std::vector<AttentionTile>>(attention_tiles());
    const auto compute = [=, plan = plan_, &a, &kernel, &cache](int chunk, std::byte* scratch) {
        const AttentionTile& tile = (*tiles)[static_cast<std::size_t>(chunk)];
        const Slice& slice = plan->batch.slices[static_cast<std::size_t>(tile.slice)];
        auto* out = reinterpret_cast<float*>(scratch);
        const auto outputs = static_cast<std::size_t>(tile.tokens * tile.heads * channels);
        float* room = out + (outputs + kLanes - 1) / kLanes * kLanes;
        for (int i = 0; i < tile.heads; ++i) {
            const int head = tile.head + i;
            kernel.attend({&cache.layout(), cache.tiles(layer, head), cache.block_stride(), slice.block_table.data(),
                           tile.tokens, tile.first, group, a.queries.row(tile.row) + head * channels,
                           out + i * channels, static_cast<std::size_t>(a.queries.stride),
                           static_cast<std::size_t>(tile.heads * channels), room});
        }
    };
    const auto commit = [=, &a](int chunk, const std::byte* scratch) {
        const AttentionTile& tile = (*tiles)[static_cast<std::size_t>(chunk)];
        const auto* out = reinterpret_cast<const float*>(scratch);
        const int width = tile.heads * channels;
        for (int n = 0; n < tile.tokens; ++n, out += width)
            std::copy_n(out, width, a.attended.floats.row(tile.out_row + n) + tile.head * channels);
    };
    phases_.push_back({static_cast<int>(tiles->size()), compute, commit});
}

}  // namespace osp
