// Calls that can be stopped. The maker of a long call holds a Call, and its thread asks now and then whether to go on.
// Code calls check_stop between two pieces of work; it throws in every thread that works for a stopped call.
#pragma once
#include <atomic>
#include <chrono>

namespace fastrerank::cpu {

// Thrown by check_stop. The results so far are incomplete.
struct Stopped {};

class Call {
public:
    Call();
    virtual ~Call();
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    bool stopped() const { return stopped_.load(std::memory_order_relaxed); }
    // Asks, if it is time to and this thread made the call.
    void look();

protected:
    enum class Answer { kGoOn, kStop, kNeverAskAgain };
    virtual Answer ask() = 0;

private:
    const void* const owner_;  // an address that no other living thread has
    Call* const before_;
    std::atomic<bool> stopped_{false};
    bool asks_ = true;
    std::chrono::steady_clock::time_point next_;
};

// While an object lives, its thread works for `call`, which may be null.
class WorksFor {
public:
    explicit WorksFor(Call* call);
    ~WorksFor();
    WorksFor(const WorksFor&) = delete;
    WorksFor& operator=(const WorksFor&) = delete;

private:
    Call* const before_;
};

// The call that this thread works for, or null.
Call* current_call();

// Takes some 30 ns, so it suits pieces of work of 10 us and more.
void check_stop();

}  // namespace fastrerank::cpu
