#include "runtime/stop.h"

namespace fastrerank::cpu {
namespace {

// An answer may have to wait for other threads (5 ms for the GIL). At this interval that costs little.
constexpr std::chrono::milliseconds kInterval(100);

thread_local Call* current = nullptr;

}  // namespace

Call::Call() : owner_(&current), before_(current), next_(std::chrono::steady_clock::now() + kInterval) {
    current = this;
}
Call::~Call() { current = before_; }

void Call::look() {
    if (owner_ != &current || !asks_ || stopped() || std::chrono::steady_clock::now() < next_) return;
    const Answer answer = ask();
    if (answer == Answer::kStop) stopped_.store(true);
    if (answer == Answer::kNeverAskAgain) asks_ = false;
    next_ = std::chrono::steady_clock::now() + kInterval;
}

WorksFor::WorksFor(Call* call) : before_(current) { current = call; }
WorksFor::~WorksFor() { current = before_; }

Call* current_call() { return current; }

void check_stop() {
    if (!current) return;
    current->look();
    if (current->stopped()) throw Stopped();
}

}  // namespace fastrerank::cpu
