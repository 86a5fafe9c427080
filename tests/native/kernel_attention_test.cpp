// KV tiles and attention of all kernels: what is written against the formula of quant.arithmetic.quantize_kv, attention
// against softmax in double precision, and that rows neither depend on one another nor see later positions.
#include <algorithm>

#include "kernel_cases.hpp"
#include "kv_cache.hpp"

namespace kernel_test {
namespace {

constexpr int kBlocks = 5, kMostPositions = 48;

// As quant.arithmetic.quantize_kv has it: x ~ (code - zero) * scale.
struct Quantized {
    std::vector<int> codes;
    float scale;
    int zero;
};

Quantized quantize(const float* x, int channels, int bits) {
    const float levels = bits == 4 ? 15.0f : 255.0f;
    float lowest = 0, highest = 0;
    for (int c = 0; c < channels; ++c) {
        if (!std::isfinite(x[c])) return {std::vector<int>(channels), kNan, 0};
        lowest = std::min(lowest, x[c]), highest = std::max(highest, x[c]);
    }
    float scale = from_bfloat16(to_bfloat16(highest / levels - lowest / levels));
    scale = std::clamp(scale, 0x1p-126f, 0x1.fep127f);
    if (lowest == 0 && highest == 0) scale = 1;
    const float zero = std::clamp(std::nearbyint(-lowest / scale), 0.0f, levels);
    Quantized q = {{}, scale, static_cast<int>(zero)};
    for (int c = 0; c < channels; ++c)
        q.codes.push_back(static_cast<int>(std::clamp(std::nearbyint(x[c] / scale) + zero, 0.0f, levels)));
    return q;
}

// What a tile holds, read by the words of `KvLayout`.
struct Tile {
    const KvLayout& layout;
    const std::uint8_t* data;

    float half(std::size_t at) const {
        std::uint16_t bits;
        std::memcpy(&bits, data + at, sizeof bits);
        return from_bfloat16(bits);
    }
    int nibble(std::size_t at, bool high) const { return high ? data[at] >> 4 : data[at] & 15; }
    int code(bool of_key, int position, int c) const {
        const int half = layout.channels / 2, low = layout.bits == 4 ? c % half : c;
        const std::size_t row = static_cast<std::size_t>(position) * layout.padded_channels * layout.bits / 8;
        const std::size_t at = of_key ? static_cast<std::size_t>(low) * kLanes + position : layout.values + row + low;
        return layout.bits == 4 ? nibble(at, c >= half) : data[at];
    }
    float scale(bool of_key, int position) const {
        return half((of_key ? layout.key_scales : layout.value_scales) + 2 * position);
    }
    int zero(bool of_key, int position) const {
        return data[(of_key ? layout.key_zeros : layout.value_zeros) + position];
    }
    double number(bool of_key, int position, int c) const {
        if (layout.bits != 16)
            return (code(of_key, position, c) - zero(of_key, position)) * static_cast<double>(scale(of_key, position));
        return half(of_key ? 2 * (static_cast<std::size_t>(c) * kLanes + position)
                           : layout.values + 2 * (static_cast<std::size_t>(position) * layout.padded_channels + c));
    }
};

// One KV head's cache of one sequence, in blocks out of order, garbage where nothing was written.
struct Cache {
    KvLayout layout;
    Exact<std::uint8_t> tiles;
    std::vector<std::int32_t> table;

    Cache(int channels, int bits, Random& random)
        : layout(KvCache(1, 1, channels, bits, 1).layout()), tiles(kBlocks * layout.bytes, 0xff) {
        for (int b = 0; b < kBlocks; ++b) table.push_back(b);
        for (int b = kBlocks - 1; b > 0; --b) std::swap(table[b], table[random.integer(0, b)]);
    }
    std::uint8_t* tile(int position) { return tiles.data() + table[position / kLanes] * layout.bytes; }
    void write(const Kernel& kernel, int position, const std::vector<float>& key, const std::vector<float>& value) {
        const Exact<float> k(key.data(), key.size()), v(value.data(), value.size());
        kernel.write_kv(layout, tile(position), position % kLanes, k.data(), v.data());
    }
};

void check_written(const Kernel& kernel, int channels, int bits) {
    Random random(static_cast<unsigned>(channels + bits));
    Cache cache(channels, bits, random);
    const float scales[] = {1, 1e-3f, 1e30f, 1e-38f, 1e-42f, 0};
    for (int position = 0; position < kLanes; ++position) {
        std::vector<float> vectors[2] = {std::vector<float>(channels), std::vector<float>(channels)};
        for (auto& x : vectors) random.numbers(x.data(), x.size(), scales[position % 6]);
        if (position == 7) vectors[0][channels - 1] = kNan, vectors[1][0] = kInfinity;
        if (position == 9) vectors[0][0] = 3.4e38f, vectors[0][1] = -3.4e38f;
        if (position == 11) vectors[0].assign(channels, -2.5f), vectors[1].assign(channels, 0.125f);
        cache.write(kernel, position, vectors[0], vectors[1]);
        const Tile tile = {cache.layout, cache.tile(position)};
        for (bool of_key : {true, false}) {
            const std::vector<float>& x = vectors[of_key ? 0 : 1];
            if (bits == 16) {
                for (int c = 0; c < channels; ++c)
                    CHECK(same(static_cast<float>(tile.number(of_key, position, c)), from_bfloat16(to_bfloat16(x[c]))),
                          "%s: 16 bits of %g", kernel.name, x[c]);
                continue;
            }
            const Quantized q = quantize(x.data(), channels, bits);
            CHECK(same(tile.scale(of_key, position), q.scale) && tile.zero(of_key, position) == q.zero,
                  "%s: %d bits, position %d: scale %g, not %g", kernel.name, bits, position,
                  tile.scale(of_key, position), q.scale);
            for (int c = 0; c < channels; ++c)
                CHECK(tile.code(of_key, position, c) == q.codes[c], "%s: %d bits, position %d: code of %g", kernel.name,
                      bits, position, x[c]);
        }
    }
}

struct Case {
    int channels, bits, first, tokens, heads;
};

// Rows `from` … `from + count - 1` of the case, as a call of their own: [count, heads, channels].
std::vector<float> attend(const Kernel& kernel, Cache& cache, const Case& c, const std::vector<float>& queries,
                          int from, int count) {
    const std::size_t width = static_cast<std::size_t>(c.heads) * c.channels, stride = width + 5;
    const int seen = c.first + from + count;
    const Exact<float> q(queries.data() + from * width, count * width);
    const Exact<std::int32_t> table(cache.table.data(), (seen + kLanes - 1) / kLanes);
    Exact<float> out((count - 1) * stride + width, kNan), scratch(attention_scratch(seen), kNan);
    kernel.attend({&cache.layout, cache.tiles.data(), cache.layout.bytes, table.data(), count, c.first + from, c.heads,
                   q.data(), out.data(), width, stride, scratch.data()});
    std::vector<float> rows;
    for (int i = 0; i < count; ++i) {
        const float* row = out.data() + i * stride;
        rows.insert(rows.end(), row, row + width);
        for (std::size_t j = width; i + 1 < count && j < stride; ++j)
            CHECK(std::isnan(row[j]), "%s: writes beyond a row", kernel.name);
    }
    return rows;
}

void check_against_double(const Kernel& kernel, Cache& cache, const Case& c, const std::vector<float>& queries,
                          const std::vector<float>& out) {
    for (int i = 0; i < c.tokens * c.heads; ++i) {
        const int seen = c.first + i / c.heads + 1;
        const float* query = queries.data() + static_cast<std::size_t>(i) * c.channels;
        std::vector<double> weights(seen);
        double highest = -1e300, total = 0;
        for (int p = 0; p < seen; ++p) {
            const Tile tile = {cache.layout, cache.tile(p)};
            for (int d = 0; d < c.channels; ++d) weights[p] += query[d] * tile.number(true, p % kLanes, d);
            weights[p] /= std::sqrt(static_cast<double>(c.channels));
            highest = std::max(highest, weights[p]);
        }
        for (double& weight : weights) total += weight = std::exp(weight - highest);
        for (int d = 0; d < c.channels; ++d) {
            double sum = 0;
            for (int p = 0; p < seen; ++p)
                sum += weights[p] / total * Tile{cache.layout, cache.tile(p)}.number(false, p % kLanes, d);
            const float got = out[static_cast<std::size_t>(i) * c.channels + d];
            CHECK(std::fabs(got - sum) < 2e-5,
                  "%s: %d bits, %d channels, %d + %d tokens, %d heads: query %d, channel %d: "
                  "%.9g, not %.9g",
                  kernel.name, c.bits, c.channels, c.first, c.tokens, c.heads, i, d, got, sum);
        }
    }
}

std::vector<float> check_attention(const Kernel& kernel, const Case& c) {
    Random random(static_cast<unsigned>(c.channels * 16 + c.tokens * c.heads));
    Cache cache(c.channels, c.bits, random);
    const std::size_t width = static_cast<std::size_t>(c.heads) * c.channels;
    const int positions = c.first + c.tokens;
    std::vector<float> key(c.channels), value(c.channels), queries(c.tokens * width);
    random.numbers(queries.data(), queries.size(), 6);
    for (int p = 0; p < positions; ++p) {
        random.numbers(key.data(), key.size(), 3), random.numbers(value.data(), value.size(), 2);
        cache.write(kernel, p, key, value);
    }
    const std::vector<float> out = attend(kernel, cache, c, queries, 0, c.tokens);
    check_against_double(kernel, cache, c, queries, out);

    for (int length : {1, 3, 5})
        for (int from = 0; from < c.tokens; from += length) {
            const int count = std::min(length, c.tokens - from);
            const std::vector<float> some = attend(kernel, cache, c, queries, from, count);
            CHECK(same(some.data(), out.data() + from * width, some.size()), "%s: tokens %d + %d of %d by themselves",
                  kernel.name, from, count, c.tokens);
        }

    // A NaN in the last token's value makes that token's row NaN and leaves the others as they are.
    value[c.channels / 2] = kNan;
    cache.write(kernel, positions - 1, key, value);
    const std::vector<float> lost = attend(kernel, cache, c, queries, 0, c.tokens);
    const std::size_t before = (c.tokens - 1) * width;
    CHECK(same(lost.data(), out.data(), before), "%s: a later NaN reaches earlier rows", kernel.name);
    for (std::size_t i = before; i < lost.size(); ++i) {
        // 16 bits keep the other channels of that value apart.
        if (c.bits == 16 && i % c.channels != static_cast<std::size_t>(c.channels) / 2) continue;
        CHECK(std::isnan(lost[i]), "%s: a NaN is lost", kernel.name);
    }
    return out;
}

}  // namespace
}  // namespace kernel_test

int main() {
    using namespace kernel_test;
    std::vector<Case> cases;
    for (int bits : {16, 8, 4})
        for (int channels : {2, 6, 16, 64, 80, 128}) {
            for (const osp::Kernel* kernel : osp::available_kernels()) check_written(*kernel, channels, bits);
            cases.push_back({channels, bits, 0, 1, 1});
            cases.push_back({channels, bits, 15, 1, 3});
            cases.push_back({channels, bits, 33, 1, 8});
            cases.push_back({channels, bits, 3, 12, 4});
        }
    for (int bits : {16, 8, 4}) {
        for (int tokens = 2; tokens < 12; ++tokens) cases.push_back({6, bits, 14, tokens, 1 + tokens % 3});
        for (int heads = 1; heads <= 8; ++heads) cases.push_back({16, bits, 16, 2, heads});
        cases.push_back({34, bits, kMostPositions - 12, 12, 7});
    }
    for (const Case& c : cases) {
        std::vector<float> first;
        for (const osp::Kernel* kernel : osp::available_kernels()) {
            const std::vector<float> out = check_attention(*kernel, c);
            if (!is_fused(*kernel)) continue;
            if (first.empty()) first = out;
            CHECK(same(out.data(), first.data(), out.size()), "%s: attention differs from the first kernel's",
                  kernel->name);
        }
    }
    std::puts("attention agrees");
}
