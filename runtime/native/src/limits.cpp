#include "limits.hpp"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "buffer.hpp"

namespace osp {
namespace {

using Clock = std::chrono::steady_clock;

// Work a second of all threads together: each repeats `work(thread)`, which returns how much it did, until the time is
// over, after `prepare(thread)`.
template <typename Prepare, typename Work>
double rate(int threads, double seconds, Prepare prepare, Work work) {
    if (threads < 1) throw std::invalid_argument("a measurement on no thread");
    std::vector<double> rates(static_cast<std::size_t>(threads));
    std::atomic<int> waiting = threads;
    const auto measure = [&](int thread) {
        prepare(thread);
        waiting.fetch_sub(1);
        while (waiting.load() > 0) std::this_thread::yield();
        const auto start = Clock::now();
        double done = 0, elapsed = 0;
        while (elapsed < seconds) {
            done += work(thread);
            elapsed = std::chrono::duration<double>(Clock::now() - start).count();
        }
        rates[static_cast<std::size_t>(thread)] = done / elapsed;
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(measure, thread);
    measure(0);
    for (std::thread& other : others) other.join();
    double total = 0;
    for (double one : rates) total += one;
    return total;
}

constexpr std::size_t kLine = 64, kPrefetch = 4096;

// Reads every line of `bytes`, a multiple of a line. The result is there so that the reads are.
std::uint64_t read(const std::uint8_t* from, std::size_t bytes) {
    std::uint64_t sums[kLine / 8] = {};
    for (std::size_t at = 0; at < bytes; at += kLine) {
        __builtin_prefetch(from + at + kPrefetch);
        std::uint64_t line[kLine / 8];
        std::memcpy(line, from + at, kLine);
        for (std::size_t i = 0; i < kLine / 8; ++i) sums[i] += line[i];
    }
    std::uint64_t total = 0;
    for (std::uint64_t sum : sums) total += sum;
    return total;
}

}  // namespace

double read_GBps(std::size_t bytes, int threads, double seconds) {
    constexpr std::size_t piece = 64 * 1024;  // between two looks at the clock
    const std::size_t share = threads < 1 ? 0 : bytes / static_cast<std::size_t>(threads) / piece * piece;
    if (threads > 0 && share == 0) throw std::invalid_argument("too few bytes to read: each thread takes 64 KiB");
    const Buffer memory(share * static_cast<std::size_t>(threads < 1 ? 0 : threads));
    std::vector<std::size_t> places(static_cast<std::size_t>(threads < 1 ? 0 : threads));
    std::atomic<std::uint64_t> sink = 0;
    const auto part = [&](int thread) { return memory.data() + static_cast<std::size_t>(thread) * share; };
    // Pages that were never written are all the same page of zeros, and that one is in the cache.
    const auto fill = [&](int thread) { std::memset(part(thread), thread + 1, share); };
    const auto work = [&](int thread) {
        std::size_t& place = places[static_cast<std::size_t>(thread)];
        sink.fetch_add(read(part(thread) + place, piece), std::memory_order_relaxed);
        place = (place + piece) % share;
        return static_cast<double>(piece);
    };
    return rate(threads, seconds, fill, work) / 1e9;
}

double dot_GOPS(const Kernel& kernel, int threads, double seconds) {
    constexpr int rounds = 4096;  // between two looks at the clock
    const auto work = [&](int) { return 2 * static_cast<double>(kernel.peak_dots(rounds)); };
    return rate(threads, seconds, [](int) {}, work) / 1e9;
}

}  // namespace osp
