// Another library's threads, that work through programs as a pool's do (pool.hpp).
//
// Inside a framework that has threads of its own, a pool beside them would compete with them for the same cores: OpenMP's
// threads spin for a while when they have nothing to do. So the framework's threads do the work.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "buffer.hpp"
#include "pool.hpp"

namespace osp {

class Team {
  public:
    // Calls fn(data) on up to `threads` threads at once, the caller's included, and returns when all have come back:
    // what GCC makes of `#pragma omp parallel`, as GNU's, LLVM's and Intel's OpenMP all have it (GOMP_parallel).
    using Parallel = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);

    // `parallel` is not needed for one thread.
    // Throws std::invalid_argument where threads < 1, or are several without `parallel`.
    Team(int threads, Parallel parallel);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int threads() const { return threads_; }

    // Whoever uses `memory` and `run` holds this lock meanwhile.
    std::unique_lock<std::mutex> lock() { return std::unique_lock(mutex_); }

    // At least so many bytes, 64-byte aligned, of any content; they stay until the next call.
    std::uint8_t* memory(std::size_t bytes) { return grown(memory_, bytes).data(); }

    // Runs the phases one after another, with so much scratch for each thread. When it returns, every chunk is
    // committed, and no thread is in the program any more.
    void run(std::vector<Phase> phases, std::size_t scratch_bytes);

  private:
    struct Work;
    static Buffer& grown(Buffer& buffer, std::size_t bytes);

    int threads_;
    Parallel parallel_;
    std::mutex mutex_;
    Buffer memory_;
    std::vector<Buffer> scratch_;  // of each thread
    std::unique_ptr<Work> work_;
};

}  // namespace osp
