// A program for the pool whose results a plain loop can check.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "expect.hpp"
#include "pool.hpp"

template <typename T>
void put(std::byte* scratch, T value) {
    std::memcpy(scratch, &value, sizeof value);
}

template <typename T>
T get(const std::byte* scratch) {
    T value;
    std::memcpy(&value, scratch, sizeof value);
    return value;
}

// A program whose every chunk mixes two results of the phase before, so that a commit that is missing, doubled or seen
// too late changes the end. The buffers are each phase's own: a late thread reads what nobody writes.
class Chain {
  public:
    explicit Chain(std::vector<int> widths) : widths_(std::move(widths)), values_(widths_.size()) {
        for (std::size_t i = 0; i < widths_.size(); ++i) values_[i].resize(widths_[i]);
        commits_ = std::vector<std::vector<std::atomic<int>>>(widths_.size());
        for (std::size_t i = 0; i < widths_.size(); ++i) commits_[i] = std::vector<std::atomic<int>>(widths_[i]);
    }

    std::vector<osp::Phase> phases() {
        std::vector<osp::Phase> phases(widths_.size());
        for (std::size_t i = 0; i < phases.size(); ++i) {
            phases[i].chunks = widths_[i];
            phases[i].compute = [this, i](int chunk, std::byte* scratch) { put(scratch, value(values_, i, chunk)); };
            phases[i].commit = [this, i](int chunk, const std::byte* scratch) {
                values_[i][chunk] = get<std::uint64_t>(scratch);
                commits_[i][chunk].fetch_add(1);
            };
        }
        return phases;
    }

    void expect_as_in_a_plain_loop(const std::string& where) const {
        Values plain(widths_.size());
        for (std::size_t i = 0; i < widths_.size(); ++i) {
            for (int chunk = 0; chunk < widths_[i]; ++chunk) plain[i].push_back(value(plain, i, chunk));
        }
        expect(values_ == plain, where + ": results as in a plain loop");
        for (const auto& phase : commits_) {
            for (const auto& count : phase) expect(count.load() == 1, where + ": each chunk committed once");
        }
    }

  private:
    using Values = std::vector<std::vector<std::uint64_t>>;

    std::uint64_t value(const Values& values, std::size_t phase, int chunk) const {
        std::uint64_t mixed = phase * 1000003 + static_cast<std::uint64_t>(chunk);
        if (phase > 0 && widths_[phase - 1] > 0) {
            const auto& before = values[phase - 1];
            mixed += 31 * before[chunk % before.size()] + before[(7 * chunk + 3) % before.size()];
        }
        return (mixed ^ mixed >> 29) * 0xbf58476d1ce4e5b9u;
    }

    std::vector<int> widths_;
    Values values_;
    std::vector<std::vector<std::atomic<int>>> commits_;
};
