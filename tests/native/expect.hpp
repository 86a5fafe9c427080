// What the test programs check with: the first thing that is not so ends the program with status 1.
#pragma once

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>

inline void expect(bool condition, const std::string& what) {
    if (condition) return;
    std::fprintf(stderr, "not so: %s\n", what.c_str());
    std::_Exit(1);
}

// Waits for another thread; gives up after a time in which even a busy machine comes to it.
inline void await(const std::function<bool()>& condition, const std::string& what) {
    for (const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20); !condition();
         std::this_thread::sleep_for(std::chrono::milliseconds(1))) {
        expect(std::chrono::steady_clock::now() < deadline, what);
    }
}
