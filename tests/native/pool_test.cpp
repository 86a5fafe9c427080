// The pool against a plain loop, and its manners.
#include "pool.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "chain.hpp"
#include "expect.hpp"

#ifdef __linux__
#include <dirent.h>
#include <sys/resource.h>

#include <fstream>
#endif

namespace {

using std::chrono::milliseconds;

std::vector<int> random_widths(std::mt19937& random, int phases, int most_chunks) {
    std::vector<int> widths(phases);
    for (int& width : widths) width = std::uniform_int_distribution(0, most_chunks)(random);
    return widths;
}

void results_are_those_of_a_plain_loop() {
    std::mt19937 random(1);
    for (int threads = 1; threads <= 8; ++threads) {
        osp::Pool pool(threads, sizeof(std::uint64_t));
        expect(pool.threads() == threads, "a pool has the threads that were asked for");
        for (int program = 0; program < 8; ++program) {
            Chain chain(random_widths(random, 40, program % 2 ? 100 : 2));
            pool.run(chain.phases());
            chain.expect_as_in_a_plain_loop(std::to_string(threads) + " threads");
            pool.quiesce();
        }
        pool.run({});
        pool.run(std::vector<osp::Phase>(3));
    }
}

bool is(std::thread::id thread) { return std::this_thread::get_id() == thread; }

// Many small phases, and every now and then a thread that loses its core, the caller too: chunks are computed again all
// the time, and threads are late by whole programs.
void stress() {
    std::mt19937 random(2);
    osp::Pool pool(4, sizeof(std::uint64_t));
    std::vector<std::unique_ptr<Chain>> chains;
    std::atomic<int> computed{0}, by_workers{0};
    const auto caller = std::this_thread::get_id();
    for (int phases = 0; phases < 20000;) {
        const int count = std::uniform_int_distribution(1, 200)(random);
        chains.push_back(std::make_unique<Chain>(random_widths(random, count, 12)));
        auto program = chains.back()->phases();
        for (osp::Phase& phase : program) {
            phase.compute = [&, compute = std::move(phase.compute)](int chunk, std::byte* scratch) {
                compute(chunk, scratch);
                if (!is(caller)) ++by_workers;
                if (computed++ % 200 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
            };
        }
        pool.run(std::move(program));
        phases += count;
    }
    pool.quiesce();
    for (const auto& chain : chains) chain->expect_as_in_a_plain_loop("stress");
    expect(by_workers > computed / 100, "workers take part");
}

void phases_are_let_go() {
    for (int threads : {1, 3}) {
        osp::Pool pool(threads, 64);
        const auto owned = std::make_shared<int>(1);
        pool.run({{8, [owned](int, std::byte*) {}, [owned](int, const std::byte*) {}}});
        pool.quiesce();
        expect(owned.use_count() == 1, "quiesce lets go of the phases");
    }
}

void scratch_is_a_threads_own() {
    constexpr std::size_t kBytes = 1000;
    osp::Pool pool(4, kBytes);
    std::atomic<int> wrong{0};
    const auto compute = [&wrong](int chunk, std::byte* scratch) {
        if (reinterpret_cast<std::uintptr_t>(scratch) % 64 != 0) ++wrong;
        std::memset(scratch, chunk % 251, kBytes);
    };
    const auto commit = [&wrong](int chunk, const std::byte* scratch) {
        const auto same = [chunk](std::byte byte) { return byte == static_cast<std::byte>(chunk % 251); };
        if (!std::all_of(scratch, scratch + kBytes, same)) ++wrong;
    };
    pool.run(std::vector<osp::Phase>(20, {100, compute, commit}));
    pool.quiesce();
    expect(wrong == 0, "scratch is aligned, and a thread's own");
}

void mistakes_are_refused() {
    const auto refused = [](const std::function<void()>& action, const std::string& word) {
        try {
            action();
        } catch (const std::invalid_argument& error) {
            expect(std::string(error.what()).find(word) != std::string::npos, word + " in \"" + error.what() + "\"");
            return;
        }
        expect(false, "refused: " + word);
    };
    refused([] { osp::Pool(0, 64); }, "not 0");
    osp::Pool pool(2, 64);
    refused([&] { pool.run({{}, {-1, {}, {}}}); }, "phase 1 of the program has -1 chunks");
    refused([&] { pool.run({{1, {}, [](int, const std::byte*) {}}}); }, "lacks compute or commit");
}

void pools_come_and_go() {
    for (int round = 0; round < 200; ++round) {
        osp::Pool pool(1 + round % 4, 64);
        if (round % 3 == 0) continue;  // without a program
        std::atomic<int> commits{0};
        pool.run({{5, [](int, std::byte*) {}, [&commits](int, const std::byte*) { ++commits; }}});
        expect(commits == 5, "a fresh pool runs a program");
    }
}

#ifdef __linux__
void idle_workers_sleep() {
    osp::Pool pool(4, 64);
    pool.run({{50, [](int, std::byte*) {}, [](int, const std::byte*) {}}});
    std::this_thread::sleep_for(milliseconds(20));
    const auto used = [] {
        rusage usage;
        getrusage(RUSAGE_SELF, &usage);
        const auto us = [](const timeval& time) { return 1'000'000 * time.tv_sec + time.tv_usec; };
        return us(usage.ru_utime) + us(usage.ru_stime);
    };
    const auto before = used();
    std::this_thread::sleep_for(milliseconds(200));
    expect(used() - before < 10'000, "idle workers use no processor");
}

void threads_have_names() {
    osp::Pool pool(3, 64);
    const auto names = [] {
        std::vector<std::string> names;
        DIR* tasks = opendir("/proc/self/task");
        while (const dirent* task = readdir(tasks)) {
            std::ifstream file("/proc/self/task/" + std::string(task->d_name) + "/comm");
            if (std::string name; std::getline(file, name) && name.starts_with("osp-native-")) names.push_back(name);
        }
        closedir(tasks);
        std::sort(names.begin(), names.end());
        return names;
    };
    await([&] { return names() == std::vector<std::string>{"osp-native-1", "osp-native-2"}; }, "workers have names");
}
#endif

}  // namespace

int main() {
    results_are_those_of_a_plain_loop();
    stress();
    phases_are_let_go();
    scratch_is_a_threads_own();
    mistakes_are_refused();
    pools_come_and_go();
#ifdef __linux__
    idle_workers_sleep();
    threads_have_names();
#endif
}
