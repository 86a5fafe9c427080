#include "pool.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "program.hpp"
#include "spin.hpp"

#if defined(__linux__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace osp {
namespace {

// How long a worker looks out for the next program before it sleeps.
constexpr auto kIdleSpin = std::chrono::microseconds(100);

// How often `quiesce` looks whether a late thread is back.
constexpr auto kQuiesceStep = std::chrono::microseconds(20);

class Scratch {
  public:
    // Whole cache lines, so that no two threads write to one.
    explicit Scratch(std::size_t bytes)
        : data_(new (kAlignment) std::byte[(bytes + kCacheLine - 1) / kCacheLine * kCacheLine]) {}

    std::byte* data() const noexcept { return data_.get(); }

  private:
    static constexpr std::align_val_t kAlignment{kCacheLine};
    struct Free {
        void operator()(std::byte* data) const noexcept { ::operator delete[](data, kAlignment); }
    };
    std::unique_ptr<std::byte[], Free> data_;
};

// What belongs to one thread.
struct alignas(kCacheLine) Seat {
    explicit Seat(std::size_t scratch_bytes) : scratch(scratch_bytes) {}

    std::atomic<Program*> inside{nullptr};  // the program that a worker is in, or is about to enter
    Scratch scratch;
    std::thread worker;  // none for the caller's seat, which is the first
};

void name_this_thread([[maybe_unused]] int number) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), ("osp-native-" + std::to_string(number)).c_str());
#elif defined(__APPLE__)
    pthread_setname_np(("osp-native-" + std::to_string(number)).c_str());
#endif
}

void check(const std::vector<Phase>& phases) {
    for (std::size_t i = 0; i < phases.size(); ++i) {
        const Phase& phase = phases[i];
        const auto refuse = [i](const std::string& what) {
            throw std::invalid_argument("phase " + std::to_string(i) + " of the program " + what);
        };
        if (phase.chunks < 0) refuse("has " + std::to_string(phase.chunks) + " chunks");
        if (phase.chunks > 0 && !(phase.compute && phase.commit)) refuse("has chunks, but lacks compute or commit");
    }
}

// One thread needs no bookkeeping.
void run_alone(const std::vector<Phase>& phases, std::byte* scratch) noexcept {
    for (const Phase& phase : phases) {
        for (int chunk = 0; chunk < phase.chunks; ++chunk) {
            phase.compute(chunk, scratch);
            phase.commit(chunk, scratch);
        }
    }
}

}  // namespace

// A worker may be late by several programs, and no program may be prepared anew while a thread is in it. So a worker
// announces the program that it enters, then looks again whether that is still the current one; `run` withdraws the
// current program, then looks for a program that nobody has announced. As all of this is sequentially consistent,
// either the worker sees that the program was withdrawn, or the next `run` sees the announcement. A worker announces
// one program at most: with as many programs as threads there is always one for `run`.
struct Pool::State {
    State(int threads, std::size_t scratch_bytes) : programs(threads) {
        for (int i = 0; i < threads; ++i) seats.push_back(std::make_unique<Seat>(scratch_bytes));
    }

    ~State() {
        stopping.store(true, std::memory_order_relaxed);
        wake_workers();
        for (const auto& seat : seats) {
            if (seat->worker.joinable()) seat->worker.join();
        }
    }

    void start_workers() {
        for (std::size_t i = 1; i < seats.size(); ++i) {
            seats[i]->worker = std::thread([this, i] { work(static_cast<int>(i)); });
        }
    }

    void wake_workers() noexcept {
        calls.fetch_add(1, std::memory_order_release);
        calls.notify_all();
    }

    // The life of a worker.
    void work(int thread) noexcept {
        name_this_thread(thread);
        Seat& seat = *seats[thread];
        for (std::uint32_t answered = 0;;) {
            answered = wait_for_call(answered);
            if (stopping.load(std::memory_order_relaxed)) return;
            if (Program* program = enter_current(seat)) program->work(thread, seat.scratch.data());
            seat.inside.store(nullptr);
        }
    }

    std::uint32_t wait_for_call(std::uint32_t answered) const noexcept {
        const auto called = [&] { return calls.load(std::memory_order_acquire) != answered; };
        if (!spin_until(Clock::now() + kIdleSpin, called)) calls.wait(answered, std::memory_order_acquire);
        return calls.load(std::memory_order_acquire);
    }

    // Null where the program is over.
    Program* enter_current(Seat& seat) const noexcept {
        for (Program* program = current.load();;) {
            seat.inside.store(program);
            Program* const still = current.load();
            if (still == program) return program;
            program = still;
        }
    }

    Program& vacant_program() noexcept {
        return *std::find_if(programs.begin(), programs.end(), [this](const Program& program) {
            return std::none_of(seats.begin(), seats.end(),
                                [&](const auto& seat) { return seat->inside.load() == &program; });
        });
    }

    std::vector<Program> programs;
    std::vector<std::unique_ptr<Seat>> seats;
    alignas(kCacheLine) std::atomic<Program*> current{nullptr};  // none between programs
    std::atomic<std::uint32_t> calls{0};  // of all workers, to a program or to stop; what they wait for
    std::atomic<bool> stopping{false};
};

Pool::Pool(int threads, std::size_t scratch_bytes) {
    if (threads < 1) {
        throw std::invalid_argument("a pool has 1 thread or more, the caller's included, not " +
                                    std::to_string(threads));
    }
    state_ = std::make_unique<State>(threads, scratch_bytes);
    state_->start_workers();
}

Pool::~Pool() = default;

int Pool::threads() const { return static_cast<int>(state_->seats.size()); }

void Pool::run(std::vector<Phase> phases) {
    check(phases);
    std::byte* const scratch = state_->seats.front()->scratch.data();
    if (threads() == 1) return run_alone(phases, scratch);

    Program& program = state_->vacant_program();
    program.prepare(std::move(phases));
    state_->current.store(&program);
    state_->wake_workers();
    program.work(0, scratch);
    state_->current.store(nullptr);
}

void Pool::quiesce() {
    for (const auto& seat : state_->seats) {
        while (seat->inside.load() != nullptr) std::this_thread::sleep_for(kQuiesceStep);
    }
    for (Program& program : state_->programs) program.clear();
}

}  // namespace osp
