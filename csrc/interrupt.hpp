// How long work hears of Ctrl-C.
#pragma once

#include <chrono>
#include <functional>
#include <utility>

namespace layercache {

// Asks whether to stop, at most every 50 ms however often it is polled: asking needs Python's lock, for which another
// thread may make it wait.
class Interrupt {
public:
    Interrupt() = default;
    explicit Interrupt(std::function<void()> ask) : ask_(std::move(ask)) {}

    // To be called after every few microseconds of work, or less often; throws what asking throws.
    void poll() const {
        if (!ask_) return;
        const auto now = Clock::now();
        if (now < next_) return;
        next_ = now + std::chrono::milliseconds(50);
        ask_();
    }

private:
    using Clock = std::chrono::steady_clock;

    std::function<void()> ask_;
    mutable Clock::time_point next_{};
};

} // namespace layercache
