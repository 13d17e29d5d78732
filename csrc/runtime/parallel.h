// A small thread pool: run_parallel(n, threads, f) calls f(0) ... f(n - 1) on the caller and up to threads - 1 workers.
// Several callers may run at once. Workers start on first use and are started anew in a forked child.
#pragma once
#include <functional>

namespace fastrerank::cpu {

// Rethrows the first exception of f after all calls in flight have ended. Before each call it does what check_stop
// does.
void run_parallel(int n, int threads, const std::function<void(int)>& f);

// Ops between torch's own run on the OpenMP workers that torch uses: those spin for milliseconds after each of torch's
// ops, and a pool beside them would share its cores with the spinning. `start` is that library's GOMP_parallel; without
// one, and in a forked child, whose parent's workers are gone, the pool does the work.
using StartOpenMp = void (*)(void (*)(void*), void*, unsigned, unsigned);
void set_openmp(StartOpenMp start);

// While one lives, run_parallel of its thread uses OpenMP.
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
