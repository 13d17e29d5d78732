#include "peak/peak.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <vector>

#include "isa/kernels.h"
#include "runtime/parallel.h"

namespace fastrerank::cpu {

double run_peak(const Kernels& k, Precision precision, int threads) {
    double best = 0;
    for (int round = 0; round < 25; ++round) {
        std::vector<double> operations(threads);
        const auto begin = std::chrono::steady_clock::now();
        run_parallel(threads, threads, [&](int i) { operations[i] = k.peak(precision, 2000000); });
        const std::chrono::duration<double> s = std::chrono::steady_clock::now() - begin;
        best = std::max(best, std::accumulate(operations.begin(), operations.end(), 0.0) / s.count());
    }
    return best;
}

}  // namespace fastrerank::cpu
