// The whole step on small random models: a token's logits are the same bits alone, in any batch, in any chunks, on any
// number of threads, over any blocks. Under AddressSanitizer it is also what no step may do to memory.
#include "model.hpp"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace {

using osp::Batch;
using osp::Format;
using osp::Kernel;
using osp::Linear;
using osp::Model;
using osp::Shape;
using osp::Slice;

struct Case {
    const char* name;
    Shape shape;
    Format format;
    int input_bits;
    bool per_token;
    int kv_bits;
    bool rotated;
    bool tied;
};

// Shapes: even ones, and some of which no width is a multiple of a vector.
constexpr Shape kEven = {97, 32, 80, 2, 4, 2, 8, 1e-5f}, kOdd = {83, 39, 54, 2, 3, 1, 6, 1e-5f};

const Case kCases[] = {
    {"w4a4 kv4", kEven, Format::kInt4, 4, false, 4, true, false},
    {"w4a4 token, tied", kOdd, Format::kInt4, 4, true, 8, true, true},
    {"w4a8 kv8", kOdd, Format::kInt4, 8, false, 8, false, false},
    {"w8a8", kEven, Format::kInt8, 8, true, 16, false, false},
    {"w4a16", kOdd, Format::kInt4, 16, false, 16, true, false},
    {"w8a16", kEven, Format::kInt8, 16, false, 4, false, false},
    {"bfloat16", kOdd, Format::kBfloat16, 16, false, 16, false, true},
    {"float32", kEven, Format::kFloat32, 16, false, 16, false, false},
};

constexpr int kBlocks = 24, kLength = 37;

void set(Model& model, Linear& linear, const Case& c, int rows, int columns, std::uint64_t seed) {
    const bool integers = c.format == Format::kInt4 || c.format == Format::kInt8;
    const float scale = (c.format == Format::kInt4 ? 0.22f : 0.0135f) / std::sqrt(static_cast<float>(columns));
    std::vector<float> scales;
    if (integers) scales.assign(c.per_token ? static_cast<std::size_t>(rows) : 1, scale);
    linear.matrix = model.pack(c.format, rows, columns, scales, nullptr, seed);
    linear.input_bits = integers ? c.input_bits : 16;
    linear.per_token = c.per_token;
    linear.input_scale = c.input_bits == 4 ? 0.4f : 0.03f;
}

osp::Hadamard sylvester(int width) {  // blocks of the largest power of two
    const std::int8_t sign = 1;
    const int power = width & -width;
    return {width / power, 1, power, &sign};
}

void fill(Model& model, const Case& c) {
    const Shape& s = c.shape;
    std::uint64_t seed = 1;
    osp::Weights& weights = model.weights();
    for (osp::Block& block : weights.blocks) {
        const int sizes[osp::kSites][2] = {{s.queries(), s.width}, {s.keys(), s.width}, {s.keys(), s.width},
                                           {s.width, s.queries()}, {s.inner, s.width},  {s.inner, s.width},
                                           {s.width, s.inner}};
        for (std::size_t i = 0; i < osp::kSites; ++i) set(model, block.linears[i], c, sizes[i][0], sizes[i][1], ++seed);
        block.linears[osp::kSites - 1].rotated = c.rotated;
        block.attention_norm.assign(static_cast<std::size_t>(s.width), 1.5f);
        block.ffn_norm.assign(static_cast<std::size_t>(s.width), 0.75f);
    }
    set(model, weights.head, c, s.vocabulary, s.width, ++seed);
    if (!c.tied) {
        Linear table;
        set(model, table, c, s.vocabulary, s.width, ++seed);
        weights.embedding = std::move(table.matrix);
    }
    weights.final_norm.assign(static_cast<std::size_t>(s.width), 1.0f);
    for (int i = 0; i < s.head_dim / 2; ++i)
        weights.rotary_frequencies.push_back(
            std::pow(10000.0f, -2.0f * static_cast<float>(i) / static_cast<float>(s.head_dim)));
    if (c.rotated) weights.ffn = sylvester(s.inner);
    if (c.kv_bits == 4) weights.queries_and_keys = sylvester(s.head_dim);
    model.check_weights();
}

std::vector<std::int32_t> tokens_of(const Shape& shape, int sequence) {
    std::mt19937 random(static_cast<unsigned>(sequence) + 7);
    std::vector<std::int32_t> tokens;
    for (int i = 0; i < kLength; ++i)
        tokens.push_back(static_cast<int>(random() % static_cast<unsigned>(shape.vocabulary)));
    return tokens;
}

// Three blocks for each of the eight sequences there is room for, far from one another.
std::vector<std::int32_t> table_of(int sequence) { return {sequence, 23 - sequence, 8 + sequence}; }

using Logits = std::vector<float>;  // [length, vocabulary]

void append(Batch& batch, int sequence, const std::vector<std::int32_t>& tokens, int start, int length) {
    batch.tokens.insert(batch.tokens.end(), tokens.begin() + start, tokens.begin() + start + length);
    batch.slices.push_back({start, length, length, table_of(sequence)});
}

bool same(const float* a, const float* b, std::size_t count) { return std::memcmp(a, b, count * sizeof(float)) == 0; }

int failures = 0;

void expect(bool right, const Case& c, const Kernel& kernel, const std::string& what) {
    if (right) return;
    ++failures;
    std::printf("FAILED: %s, %s: %s\n", kernel.name, c.name, what.c_str());
}

// Every token by itself, on one thread: what all else is compared with.
Logits token_by_token(const Case& c, const Kernel& kernel) {
    Model model(c.shape, c.kv_bits, kBlocks, kBlocks * osp::kLanes, 8, 1, kernel);
    fill(model, c);
    const auto tokens = tokens_of(c.shape, 0);
    Logits logits;
    for (int i = 0; i < kLength; ++i) {
        Batch batch;
        append(batch, 0, tokens, i, 1);
        model.step(batch);
        logits.insert(logits.end(), model.logits(), model.logits() + c.shape.vocabulary);
    }
    for (float logit : logits)
        if (!std::isfinite(logit)) {
            expect(false, c, kernel, "a logit is not finite");
            break;
        }
    return logits;
}

void check_threads(const Case& c, const Kernel& kernel, const Logits& expected, int threads) {
    const auto width = static_cast<std::size_t>(c.shape.vocabulary);
    Model model(c.shape, c.kv_bits, kBlocks, kBlocks * osp::kLanes, 8 * kLength, threads, kernel);
    fill(model, c);
    const auto tokens = tokens_of(c.shape, 0);
    for (int chunk : {1, 2, 3, 5, 8, 13, 16, 17, 36, kLength})
        for (int start = 0; start < kLength; start += chunk) {
            const int length = std::min(chunk, kLength - start);
            Batch batch;
            append(batch, 0, tokens, start, length);
            model.step(batch);
            expect(same(model.logits(), expected.data() + static_cast<std::size_t>(start) * width,
                        static_cast<std::size_t>(length) * width),
                   c, kernel, "chunks of " + std::to_string(chunk) + ", " + std::to_string(threads) + " threads");
        }
    for (int others : {1, 3, 7}) {
        Batch batch;
        for (int sequence = others; sequence >= 0; --sequence)
            append(batch, sequence, sequence == 0 ? tokens : tokens_of(c.shape, sequence), 0, kLength);
        model.step(batch);
        const float* last = model.logits() + static_cast<std::size_t>(others * kLength) * width;
        expect(same(last, expected.data(), expected.size()), c, kernel, "in a batch of " + std::to_string(others + 1));
        model.copy_block(0, 3), model.copy_block(23, 20), model.copy_block(8, 11);  // sequence 0's to sequence 3's
        Batch next;
        append(next, 3, tokens, kLength - 1, 1);
        model.step(next);
        expect(same(model.logits(), expected.data() + static_cast<std::size_t>(kLength - 1) * width, width), c, kernel,
               "over copied blocks");
    }
}

}  // namespace

int main() {
    for (const Kernel* kernel : osp::available_kernels())
        for (const Case& c : kCases) {
            const Logits expected = token_by_token(c, *kernel);
            for (int threads : {1, 2, 4}) check_threads(c, *kernel, expected, threads);
        }
    std::printf(failures == 0 ? "all steps agree\n" : "%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
