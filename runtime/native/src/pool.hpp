// Threads that work through a program together, and do not wait for one that has lost its core.
//
// A program is a sequence of phases, a phase a number of chunks. Every thread walks through the phases, the caller's
// like the others, so that none leads: threads take chunks until none is left, and go on when all are delivered. A
// chunk is computed into the thread's own scratch and then committed, once, by whoever delivers it first. So when a
// phase has nothing left to take, but a chunk is still out with a thread that does not come back (it has lost its core
// to another process), the waiting threads compute that chunk again. The late thread finds its chunk delivered, drops
// what it has and catches up.
//
// What `compute` reads may already have been overwritten when a late thread reads it; the result is dropped, but it
// must not be led astray: `compute` takes sizes and indices from the program only, which stays as it is until no
// thread is in it any more.
//
// Only `compute` is done again. A thread that loses its core in the middle of `commit` is waited for, so `commit` should
// do little.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

namespace osp {

// Neither function may throw: an exception that leaves one ends the process (std::terminate), on whatever thread it is.
struct Phase {
    int chunks = 0;
    // compute(chunk, scratch): from shared inputs into scratch. May run more than once, on several threads at once.
    std::function<void(int, std::byte*)> compute;
    // commit(chunk, scratch): from scratch to the shared outputs. Runs once for each chunk. What it writes is visible
    // to every later phase, and to the caller.
    std::function<void(int, const std::byte*)> commit;
};

// A pool does not survive a fork: the child has its memory, but not its threads. Make pools after forking, and leave
// alone those of the parent, which cannot be destroyed in the child either.
class Pool {
  public:
    // `threads` in all, the caller's own included; each has `scratch_bytes` (64-byte aligned).
    // Throws std::invalid_argument where threads < 1, std::system_error where the system gives no more threads.
    Pool(int threads, std::size_t scratch_bytes);
    // Waits until no thread is in any program. Not while `run` runs.
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const;

    // Runs the phases one after another. One caller at a time, not from within a phase. Returns when every chunk is
    // committed. The phases are kept until no thread is in them any more, which may be after the return: until a later
    // `run` or `quiesce`.
    // Throws std::invalid_argument, before anything runs, where a phase has fewer than 0 chunks, or chunks and no
    // function.
    void run(std::vector<Phase> phases);

    // Waits until no thread is in any program, and lets go of the phases: what programs refer to may be freed
    // afterwards. Not while `run` runs.
    void quiesce();

  private:
    struct State;
    std::unique_ptr<State> state_;
};

// Threads that this process may use to advantage: its affinity mask, cut to its cgroup's CPU quota, at least 1.
int available_threads();

}  // namespace osp
