// A small thread pool: run(n, threads, f) calls f(0) ... f(n - 1) on the caller and up to threads - 1 workers.
// Several callers may run at once. Workers start on first use and are started anew in a forked child.
#pragma once
#include <functional>

namespace fastrerank::cpu {

// Rethrows the first exception of f after all calls in flight have ended.
void run_parallel(int n, int threads, const std::function<void(int)>& f);

}  // namespace fastrerank::cpu
