// Waiting without giving up the core.
#pragma once

#include <chrono>

namespace osp {

using Clock = std::chrono::steady_clock;

// Tells the core that this is a loop that waits.
inline void pause() noexcept {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");  // most Arm cores take "yield" for a no-op
#endif
}

// Whether `done` came true before the deadline.
template <typename Condition>
bool spin_until(Clock::time_point deadline, Condition done) noexcept {
    constexpr int kLooksPerClock = 8;
    do {
        for (int look = 0; look < kLooksPerClock; ++look) {
            if (done()) return true;
            pause();
        }
    } while (Clock::now() < deadline);
    return false;
}

}  // namespace osp
