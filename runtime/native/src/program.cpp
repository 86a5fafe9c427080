#include "program.hpp"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "spin.hpp"

namespace osp {
namespace {

// How long a thread waits for a chunk that is out before it computes it itself: twice what its own chunks of the phase
// took, within these bounds. To compute a chunk in vain costs no more time than was waited before, so a thread that had
// no chunk, and cannot say how long one takes, waits the least.
constexpr auto kLeastPatience = std::chrono::microseconds(5);
constexpr auto kMostPatience = std::chrono::microseconds(100);

Clock::duration patience(Clock::duration elapsed, int chunks) noexcept {
    if (chunks == 0) return kLeastPatience;
    return std::clamp<Clock::duration>(2 * elapsed / chunks, kLeastPatience, kMostPatience);
}

void compute_and_deliver(const Phase& phase, Progress& progress, int chunk, std::byte* scratch) noexcept {
    phase.compute(chunk, scratch);
    // The claim orders nothing. Where it succeeds the phase was not over, so its inputs were what they should be; and
    // it is `remaining` that publishes what is committed.
    if (progress.delivered[chunk].exchange(true, std::memory_order_relaxed)) return;
    phase.commit(chunk, scratch);
    progress.remaining.fetch_sub(1, std::memory_order_acq_rel);
}

// When every chunk is taken: computes one again that is still out. False where those that remain are being committed.
bool compute_again(const Phase& phase, Progress& progress, int thread, std::byte* scratch) noexcept {
    const auto is_out = [&](int chunk) { return !progress.delivered[chunk].load(std::memory_order_relaxed); };
    int out = 0;
    for (int chunk = 0; chunk < phase.chunks; ++chunk) out += is_out(chunk);
    if (out == 0) return false;
    // Chunks are taken in order, so the first are out for longest. Threads that wait together begin at different ones.
    int before = thread % out;
    for (int chunk = 0; chunk < phase.chunks; ++chunk) {
        if (!is_out(chunk) || before-- > 0) continue;
        compute_and_deliver(phase, progress, chunk, scratch);
        break;
    }
    return true;
}

// At the return every chunk of the phase is committed.
void work_on(const Phase& phase, Progress& progress, int thread, std::byte* scratch) noexcept {
    const auto begin = Clock::now();
    int taken = 0;
    for (int chunk; (chunk = progress.next.fetch_add(1, std::memory_order_relaxed)) < phase.chunks; ++taken) {
        compute_and_deliver(phase, progress, chunk, scratch);
    }
    if (progress.finished()) return;
    const auto end = Clock::now();
    if (spin_until(end + patience(end - begin, taken), [&] { return progress.finished(); })) return;
    while (!progress.finished()) {
        if (!compute_again(phase, progress, thread, scratch)) std::this_thread::yield();
    }
}

}  // namespace

void Program::prepare(std::vector<Phase> phases) {
    std::size_t chunks = 0;
    for (const Phase& phase : phases) chunks += static_cast<std::size_t>(phase.chunks);
    if (progress_.size() < phases.size()) progress_ = std::vector<Progress>(phases.size());
    if (delivered_.size() < chunks) delivered_ = std::vector<std::atomic<bool>>(chunks);

    for (std::size_t chunk = 0; chunk < chunks; ++chunk) delivered_[chunk].store(false, std::memory_order_relaxed);
    std::atomic<bool>* delivered = delivered_.data();
    for (std::size_t i = 0; i < phases.size(); ++i) {
        progress_[i].next.store(0, std::memory_order_relaxed);
        progress_[i].remaining.store(phases[i].chunks, std::memory_order_relaxed);
        progress_[i].delivered = delivered;
        delivered += phases[i].chunks;
    }
    phases_ = std::move(phases);
}

void Program::work(int thread, std::byte* scratch) noexcept {
    for (std::size_t i = 0; i < phases_.size(); ++i) {
        if (!progress_[i].finished()) work_on(phases_[i], progress_[i], thread, scratch);
    }
}

}  // namespace osp
