// Calls that can be given up. Who makes a long call holds a Call, whose thread asks now and then whether it should go
// on; check_stop, between two pieces of work, throws in every thread that works for a call that should not.
#pragma once
#include <atomic>
#include <chrono>

namespace fastrerank::cpu {

// Thrown by check_stop. What was computed so far is of no use.
struct Stopped {};

class Call {
public:
    Call();
    virtual ~Call();
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    bool stopped() const { return stopped_.load(std::memory_order_relaxed); }
    // Asks, where it is time to and the thread is the one that made the call.
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

// While one lives, its thread works for `call`, which may be null.
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

// Some 30 ns: for pieces of work that take 10 us and more.
void check_stop();

}  // namespace fastrerank::cpu
