// What the threads of a pool share while they work: phases, and how far they are.
#pragma once

#include <atomic>
#include <cstddef>
#include <vector>

#include "pool.hpp"

namespace osp {

constexpr std::size_t kCacheLine = 64;

// How far a phase is. Whoever delivers a chunk takes the next one, so both counters share a cache line.
struct alignas(kCacheLine) Progress {
    std::atomic<int> next{0};               // chunk to take; beyond the last one when none is left
    std::atomic<int> remaining{0};          // chunks that are not committed
    std::atomic<bool>* delivered{nullptr};  // [chunks], true from when a thread has begun to commit

    bool finished() const noexcept { return remaining.load(std::memory_order_acquire) == 0; }
};

// Its memory serves for one sequence of phases after another.
class Program {
  public:
    // While no thread is in it. Phases are as `Pool::run` takes them.
    void prepare(std::vector<Phase> phases);
    void clear() noexcept { phases_.clear(); }

    // Works through all the phases with the other threads. At the return every chunk is committed.
    void work(int thread, std::byte* scratch) noexcept;

  private:
    std::vector<Phase> phases_;
    std::vector<Progress> progress_;            // [phases], or longer
    std::vector<std::atomic<bool>> delivered_;  // [chunks of all phases], or longer
};

}  // namespace osp
