// Scaled dot-product attention over KV tiles, the same bits however the queries of a call are grouped.
//
// Scores: for each 16 positions (the lanes), two chains of fused multiply-adds over the channels, even and odd steps,
// added at the end. Scales lie outside the sums: score = (sum q * code - zero * sum q) * scale. Then the softmax over
// exactly the positions that a query sees, its denominator summed in 16 lanes by position mod 16. Values: one chain of
// multiply-adds over the positions for each channel (the lanes), with weight * scale for weights, less the sum of
// weight * scale * zero.
#pragma once

#include "kv_tile.hpp"

namespace osp {
namespace {

constexpr int kQueryGroup = 8;  // queries that share what is read of a tile

// Some queries of an `Attention`, a pointer and the number of positions seen for each.
struct QueryGroup {
    int count;
    const float* query[kQueryGroup];
    float* out[kQueryGroup];
    int seen[kQueryGroup];
    float* scores[kQueryGroup];  // whole tiles of positions
};

OSP_INLINE const std::uint8_t* tile_of(const Attention& a, int block) {
    return a.tiles + static_cast<std::size_t>(a.block_table[block]) * a.block_stride;
}

// Two vectors of keys, [16 positions], of step s: of channels s and s + C/2 (4 bits) or of 2 s and 2 s + 1.
template <int bits>
OSP_INLINE void load_keys(const std::uint8_t* keys, int step, Floats* first, Floats* second) {
    if constexpr (bits == 4) {
        const Ints both = load_bytes(keys + step * kLanes);
        *first = to_floats(both & broadcast(15));
        *second = to_floats(both >> 4);
    } else if constexpr (bits == 8) {
        *first = to_floats(load_bytes(keys + 2 * step * kLanes));
        *second = to_floats(load_bytes(keys + (2 * step + 1) * kLanes));
    } else {
        *first = load_bfloat16(keys + 4 * step * kLanes);
        *second = load_bfloat16(keys + 4 * step * kLanes + 2 * kLanes);
    }
}

// Raw scores of `queries` queries over `blocks` tiles from `block` on.
template <int bits, int queries, int blocks>
void score_tiles(const Attention& a, const QueryGroup& group, int from, int block, const float* query_sums) {
    const KvLayout& layout = *a.layout;
    const int half = layout.channels / 2;
    const std::uint8_t* tiles[blocks];
    OSP_UNROLL
    for (int b = 0; b < blocks; ++b) tiles[b] = tile_of(a, block + b);
    Floats even[queries][blocks] = {}, odd[queries][blocks] = {};
    for (int step = 0; step < half; ++step) {
        const int c = bits == 4 ? step : 2 * step, d = bits == 4 ? step + half : 2 * step + 1;
        OSP_UNROLL
        for (int b = 0; b < blocks; ++b) {
            Floats first, second;
            load_keys<bits>(tiles[b], step, &first, &second);
            OSP_UNROLL
            for (int q = 0; q < queries; ++q) {
                even[q][b] = multiply_add(first, broadcast(group.query[from + q][c]), even[q][b]);
                odd[q][b] = multiply_add(second, broadcast(group.query[from + q][d]), odd[q][b]);
            }
        }
    }
    OSP_UNROLL
    for (int b = 0; b < blocks; ++b) OSP_UNROLL
    for (int q = 0; q < queries; ++q) {
        Floats score = even[q][b] + odd[q][b];
        if constexpr (bits != 16) {
            const Floats scale = load_bfloat16(tiles[b] + layout.key_scales);
            const Floats zero = to_floats(load_bytes(tiles[b] + layout.key_zeros));
            score = (score - zero * broadcast(query_sums[from + q])) * scale;
        }
        store(group.scores[from + q] + (block + b) * kLanes, score);
    }
}

template <int bits, int queries, int blocks>
void score_all(const Attention& a, const QueryGroup& group, int from, int count, const float* query_sums) {
    int block = 0;
    for (; block + blocks <= count; block += blocks)
        score_tiles<bits, queries, blocks>(a, group, from, block, query_sums);
    for (; block < count; ++block) score_tiles<bits, queries, 1>(a, group, from, block, query_sums);
}

// From scores to weights in place; zeros beyond `seen`.
void softmax(float* scores, int seen, float root) {
    const int tiles = (seen + kLanes - 1) / kLanes * kLanes;
    const Floats divisor = broadcast(root), nothing = broadcast(-__builtin_inff());
    Floats highest = nothing;
    for (int p = 0; p < tiles; p += kLanes) {
        const Floats score = select(indices(p) < broadcast(seen), load(scores + p) / divisor, nothing);
        highest = larger(score, highest);
        store(scores + p, score);
    }
    const Floats top = broadcast(largest_of(highest));
    Floats sums = {};
    for (int p = 0; p < tiles; p += kLanes) {
        const Floats weight = exponential(load(scores + p) - top);
        sums = sums + weight;
        store(scores + p, weight);
    }
    const Floats total = broadcast(sum_of(sums));
    for (int p = 0; p < tiles; p += kLanes) store(scores + p, load(scores + p) / total);
}

// Multiplies weights by the scales of their values; returns the sum of weight * scale * zero, in lanes by position
// mod 16, then the lanes as a tree.
float scale_weights(const Attention& a, float* weights, int seen) {
    const KvLayout& layout = *a.layout;
    Floats offset = {};
    for (int p = 0; p < seen; p += kLanes) {
        const std::uint8_t* tile = tile_of(a, p / kLanes);
        const Floats scaled = load(weights + p) * load_bfloat16(tile + layout.value_scales);
        const Floats seen_only = select(indices(p) < broadcast(seen), scaled, Floats{});  // a scale beyond may be NaN
        store(weights + p, seen_only);
        offset = multiply_add(seen_only, to_floats(load_bytes(tile + layout.value_zeros)), offset);
    }
    return sum_of(offset);
}

// Two vectors of the values of one position: of channels from `at` on and, with 4 bits, from C'/2 + `at` on.
template <int bits>
OSP_INLINE void load_values(const std::uint8_t* row, int at, Floats* first, Floats* second) {
    if constexpr (bits == 4) {
        const Ints both = load_bytes(row + at);
        *first = to_floats(both & broadcast(15));
        *second = to_floats(both >> 4);
    } else if constexpr (bits == 8) {
        *first = to_floats(load_bytes(row + at));
        *second = Floats{};
    } else {
        *first = load_bfloat16(row + 2 * at);
        *second = Floats{};
    }
}

// The weighted sums of `vectors` vectors of channels from `at` on, for `queries` queries.
template <int bits, int queries, int vectors>
void mix_values(const Attention& a, const QueryGroup& group, int from, int at, const float* offsets) {
    const KvLayout& layout = *a.layout;
    const std::size_t row_bytes = static_cast<std::size_t>(layout.padded_channels) * bits / 8;
    Floats low[queries][vectors] = {}, high[queries][vectors] = {};
    // Queries see more positions the later they stand, so that all see what the first one sees.
    const int shared = group.seen[from], all = group.seen[from + queries - 1];
    for (int p = 0; p < all; ++p) {
        const std::uint8_t* row = tile_of(a, p / kLanes) + layout.values + (p % kLanes) * row_bytes;
        OSP_UNROLL
        for (int v = 0; v < vectors; ++v) {
            Floats first, second;
            load_values<bits>(row, at + v * kLanes, &first, &second);
            OSP_UNROLL
            for (int q = 0; q < queries; ++q) {
                if (p >= shared && p >= group.seen[from + q]) continue;
                const Floats weight = broadcast(group.scores[from + q][p]);
                low[q][v] = multiply_add(first, weight, low[q][v]);
                if constexpr (bits == 4) high[q][v] = multiply_add(second, weight, high[q][v]);
            }
        }
    }
    const int half = layout.channels / 2;
    OSP_UNROLL
    for (int q = 0; q < queries; ++q) OSP_UNROLL
    for (int v = 0; v < vectors; ++v) {
        const int c = at + v * kLanes;
        const Floats offset = broadcast(offsets[from + q]);
        float* out = group.out[from + q];
        if constexpr (bits == 4) {
            store_first(out + c, low[q][v] - offset, half - c);
            store_first(out + half + c, high[q][v] - offset, half - c);
        } else {
            store_first(out + c, low[q][v] - offset, layout.channels - c);
        }
    }
}

template <int bits, int queries, int vectors>
void mix_all(const Attention& a, const QueryGroup& group, int from, const float* offsets) {
    const int channels = bits == 4 ? a.layout->channels / 2 : a.layout->channels;
    int at = 0;
    for (; at + (vectors - 1) * kLanes < channels; at += vectors * kLanes)
        mix_values<bits, queries, vectors>(a, group, from, at, offsets);
    for (; at < channels; at += kLanes) mix_values<bits, queries, 1>(a, group, from, at, offsets);
}

// Queries from `from` on, as many at a time as fit into registers.
template <int bits, int queries, int blocks, int vectors>
int attend_some(const Attention& a, const QueryGroup& group, int from) {
    for (; from + queries <= group.count; from += queries) {
        float query_sums[kQueryGroup] = {}, offsets[kQueryGroup] = {};
        for (int q = from; bits != 16 && q < from + queries; ++q) {
            Floats sum = {};
            for (int c = 0; c < a.layout->channels; c += kLanes)
                sum = sum + load_first(group.query[q] + c, a.layout->channels - c);
            query_sums[q] = sum_of(sum);
        }
        const int tiles = (group.seen[from + queries - 1] + kLanes - 1) / kLanes;
        score_all<bits, queries, blocks>(a, group, from, tiles, query_sums);
        const float root = __builtin_sqrtf(static_cast<float>(a.layout->channels));
        for (int q = from; q < from + queries; ++q) {
            softmax(group.scores[q], group.seen[q], root);
            if (bits != 16) offsets[q] = scale_weights(a, group.scores[q], group.seen[q]);
        }
        mix_all<bits, queries, vectors>(a, group, from, offsets);
    }
    return from;
}

template <int bits>
void attend_bits(const Attention& a) {
    const int queries = a.tokens * a.heads;
    const int positions = (a.first + a.tokens + kLanes - 1) / kLanes * kLanes;
    for (int start = 0; start < queries; start += kQueryGroup) {
        QueryGroup group = {};
        group.count = queries - start < kQueryGroup ? queries - start : kQueryGroup;
        for (int i = 0; i < group.count; ++i) {
            const std::size_t row = static_cast<std::size_t>((start + i) / a.heads), head = (start + i) % a.heads;
            group.query[i] = a.queries + row * a.row_stride + head * a.layout->channels;
            group.out[i] = a.out + row * a.out_stride + head * a.layout->channels;
            group.seen[i] = a.first + static_cast<int>(row) + 1;
            group.scores[i] = a.scratch + static_cast<std::size_t>(i) * positions;
        }
        int done = 0;
        if constexpr (kVectors >= 32) {
            done = attend_some<bits, 8, 1, 1>(a, group, done);
            done = attend_some<bits, 4, 2, 2>(a, group, done);
            done = attend_some<bits, 2, 4, 4>(a, group, done);
            attend_some<bits, 1, 4, 4>(a, group, done);
        } else if constexpr (kVectors >= 8) {
            done = attend_some<bits, 2, 1, bits == 4 ? 1 : 2>(a, group, done);
            attend_some<bits, 1, 2, 2>(a, group, done);
        } else {
            attend_some<bits, 1, 1, 1>(a, group, done);
        }
    }
}

void attend(const Attention& a) {
    if (a.layout->bits == 4) return attend_bits<4>(a);
    if (a.layout->bits == 8) return attend_bits<8>(a);
    attend_bits<16>(a);
}

}  // namespace
}  // namespace osp
