#include "team.hpp"

#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>

#include "program.hpp"

namespace osp {

struct Team::Work {
    Program program;
    std::vector<Buffer>* scratch = nullptr;
    std::atomic<int> seats{0};  // taken in this run
};

Team::Team(int threads, Parallel parallel) : threads_(threads), parallel_(parallel), work_(std::make_unique<Work>()) {
    if (threads < 1) throw std::invalid_argument("a team has 1 thread or more, not " + std::to_string(threads));
    if (threads > 1 && parallel == nullptr) throw std::invalid_argument("a team of several threads needs OpenMP's");
    scratch_.resize(static_cast<std::size_t>(threads));
    work_->scratch = &scratch_;
}

Team::~Team() = default;

Buffer& Team::grown(Buffer& buffer, std::size_t bytes) {
    if (buffer.size() < bytes) buffer = Buffer(bytes + bytes / 2);
    return buffer;
}

void Team::run(std::vector<Phase> phases, std::size_t scratch_bytes) {
    for (Buffer& scratch : scratch_) grown(scratch, scratch_bytes);
    work_->program.prepare(std::move(phases));
    work_->seats.store(0, std::memory_order_relaxed);
    const auto work = [](void* data) {
        auto* self = static_cast<Work*>(data);
        const int seat = self->seats.fetch_add(1, std::memory_order_relaxed);
        self->program.work(seat, (*self->scratch)[static_cast<std::size_t>(seat)].as<std::byte>());
    };
    if (threads_ == 1)
        work(work_.get());
    else
        parallel_(work, work_.get(), static_cast<unsigned>(threads_), 0);
    work_->program.clear();
}

}  // namespace osp
