// A small thread pool: run_parallel(n, threads, f) calls f(0) ... f(n - 1) on the caller and up to threads - 1 workers.
// Several callers may run at once. Workers start on first use and are started anew in a forked child.
#pragma once
#include <functional>

namespace fastrerank::cpu {

// Rethrows the first exception of f after all calls in flight have ended. Calls check_stop before each call of f.
void run_parallel(int n, int threads, const std::function<void(int)>& f);

// Ops that run between torch's own ops use the OpenMP workers of torch. Those spin for milliseconds after each of
// torch's ops, and a second pool would share its cores with them. `start` is GOMP_parallel of torch's library. Without
// it, and in a forked child, which has no workers of its parent, the pool does the work.
using StartOpenMp = void (*)(void (*)(void*), void*, unsigned, unsigned);
void set_openmp(StartOpenMp start);

// While an object lives, run_parallel uses OpenMP in its thread.
class OnOpenMp {
public:
    OnOpenMp();
    ~OnOpenMp();
    OnOpenMp(const OnOpenMp&) = delete;
    OnOpenMp& operator=(const OnOpenMp&) = delete;

private:
    bool before_;
};

}  // namespace fastrerank::cpu
