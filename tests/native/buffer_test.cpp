// Buffers are zeroed, aligned and apart from each other, of whatever pages; what they took is given back.
#include "buffer.hpp"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "expect.hpp"

namespace {

using osp::Buffer;
using osp::Pages;

constexpr std::size_t kMegabyte = std::size_t{1} << 20;

// Of this process, in bytes.
std::size_t resident() {
    std::size_t size = 0, pages = 0;
    std::ifstream("/proc/self/statm") >> size >> pages;
    return pages * 4096;
}

bool all(const Buffer& buffer, std::uint8_t value) {
    return std::all_of(buffer.data(), buffer.data() + buffer.size(), [&](std::uint8_t byte) { return byte == value; });
}

void test_each_has_its_own_bytes(Pages pages) {
    std::vector<Buffer> buffers;
    for (int round = 0; round < 3; ++round)  // more than shared pages hold at a time
        for (const std::size_t bytes : {std::size_t{1}, std::size_t{63}, std::size_t{4097}, kMegabyte, 5 * kMegabyte})
            for (int i = 0; i < 5; ++i) buffers.emplace_back(bytes, pages);
    for (std::size_t i = 0; i < buffers.size(); ++i) {
        expect(all(buffers[i], 0), "a new buffer is zeroed");
        expect(reinterpret_cast<std::uintptr_t>(buffers[i].data()) % 64 == 0, "a buffer is aligned");
        std::fill_n(buffers[i].data(), buffers[i].size(), static_cast<std::uint8_t>(i + 1));
    }
    for (std::size_t i = 0; i < buffers.size(); ++i)
        expect(all(buffers[i], static_cast<std::uint8_t>(i + 1)), "nobody writes into another's bytes");
}

void test_memory_is_given_back(Pages pages) {
    const std::size_t before = resident();
    for (int round = 0; round < 100; ++round) {
        std::vector<Buffer> buffers;
        for (int i = 0; i < 12; ++i) {
            buffers.emplace_back(kMegabyte, pages);
            expect(all(buffers.back(), 0), "a buffer is zeroed where another was");
            std::fill_n(buffers.back().data(), kMegabyte, std::uint8_t{1});
        }
        expect(resident() < before + 64 * kMegabyte, "memory is given back");
    }
}

// The others of a shared page keep it.
void test_one_goes_and_the_others_stay() {
    std::vector<Buffer> buffers;
    for (int i = 0; i < 100; ++i) {
        buffers.emplace_back(kMegabyte / 2, Pages::kShared);
        std::fill_n(buffers.back().data(), buffers.back().size(), static_cast<std::uint8_t>(i + 1));
    }
    Buffer last = std::move(buffers.back());
    expect(buffers.back().data() == nullptr && buffers.back().size() == 0, "nothing is left where a buffer was moved");
    buffers.clear();
    expect(all(last, 100), "a buffer stays whole when the others are gone");
}

}  // namespace

int main() {
    for (const Pages pages : {Pages::kHuge, Pages::kSmall, Pages::kShared}) {
        test_each_has_its_own_bytes(pages);
        test_memory_is_given_back(pages);
    }
    test_one_goes_and_the_others_stay();
    std::puts("buffers: all hold");
}
