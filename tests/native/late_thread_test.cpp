// Threads of a pool that are late, at every place where one can be.
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "chain.hpp"
#include "expect.hpp"
#include "pool.hpp"

namespace {

using std::chrono::milliseconds;

bool is(std::thread::id thread) { return std::this_thread::get_id() == thread; }

// A thread that is kept inside a function of a phase, as if it had lost its core.
struct Held {
    std::atomic<bool> entered{false}, released{false}, left{false};

    void hold() {
        entered = true;
        await([this] { return released.load(); }, "a held thread is released");
        left = true;
    }
};

// Holds the first worker that comes to compute a chunk of the phase. The caller waits in its own chunk until one has.
void hold_a_worker(osp::Phase& phase, Held& held) {
    phase.compute = [compute = phase.compute, caller = std::this_thread::get_id(), &held](int chunk,
                                                                                          std::byte* scratch) {
        if (is(caller)) await([&held] { return held.entered.load(); }, "a worker takes part");
        compute(chunk, scratch);
        if (!is(caller) && !held.entered.exchange(true)) held.hold();
    };
}

void a_held_worker_holds_nobody() {
    for (int threads = 2; threads <= 4; ++threads) {
        osp::Pool pool(threads, sizeof(std::uint64_t));
        std::vector<std::unique_ptr<Chain>> chains;
        const auto add = [&chains]() -> Chain& {
            return *chains.emplace_back(std::make_unique<Chain>(std::vector<int>{2, 30, 1, 17}));
        };
        Held held;
        auto phases = add().phases();
        hold_a_worker(phases.front(), held);
        pool.run(std::move(phases));
        expect(!held.left, "a program ends while a worker is held");
        chains.back()->expect_as_in_a_plain_loop("beside a held worker");
        // More programs than the pool has room for, if it did not use that of finished ones again.
        for (int program = 0; program < 3 * threads; ++program) pool.run(add().phases());

        std::thread release([&held] {
            std::this_thread::sleep_for(milliseconds(30));
            held.released = true;
        });
        pool.quiesce();
        expect(held.left, "quiesce waits for a late thread");
        release.join();
        for (const auto& chain : chains) chain->expect_as_in_a_plain_loop("after a late worker's return");

        // It is back at work: it is held again.
        Held again;
        again.released = true;
        auto later = add().phases();
        hold_a_worker(later.front(), again);
        pool.run(std::move(later));
        pool.quiesce();
        chains.back()->expect_as_in_a_plain_loop("with a worker that was late");
    }
}

// The caller leads no more than the others: they finish the program without it.
void a_held_caller_holds_nobody() {
    osp::Pool pool(2, sizeof(std::uint64_t));
    Chain chain({2, 30, 1, 17});
    auto phases = chain.phases();
    std::atomic<int> last_phase{0};
    phases.front().compute = [compute = phases.front().compute, caller = std::this_thread::get_id(), &last_phase](
                                 int chunk, std::byte* scratch) {
        compute(chunk, scratch);
        if (is(caller)) await([&last_phase] { return last_phase == 17; }, "workers finish a program alone");
    };
    phases.back().commit = [commit = phases.back().commit, &last_phase](int chunk, const std::byte* scratch) {
        commit(chunk, scratch);
        ++last_phase;
    };
    pool.run(std::move(phases));
    chain.expect_as_in_a_plain_loop("beside a held caller");
    pool.quiesce();
}

void a_begun_commit_is_waited_for() {
    osp::Pool pool(3, sizeof(std::uint64_t));
    Chain chain({3, 5});
    auto phases = chain.phases();
    std::atomic<bool> begun{false}, ended{false};
    const auto caller = std::this_thread::get_id();
    phases.front().compute = [compute = phases.front().compute, caller, &begun](int chunk, std::byte* scratch) {
        if (is(caller)) await([&begun] { return begun.load(); }, "a worker commits");
        compute(chunk, scratch);
    };
    phases.front().commit = [commit = phases.front().commit, &begun, &ended](int chunk, const std::byte* scratch) {
        const bool first = !begun.exchange(true);
        if (first) std::this_thread::sleep_for(milliseconds(20));
        commit(chunk, scratch);
        if (first) ended = true;
    };
    pool.run(std::move(phases));
    expect(ended, "run returns when the last commit has ended");
    chain.expect_as_in_a_plain_loop("with a slow commit");
    pool.quiesce();
}

}  // namespace

int main() {
    a_held_worker_holds_nobody();
    a_held_caller_holds_nobody();
    a_begun_commit_is_waited_for();
}
