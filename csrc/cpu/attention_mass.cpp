#include "attention_mass.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "encoder.h"
#include "parallel.h"

namespace fastrerank::cpu {
namespace {

// Panels of a task: 480 keys, which with the queries stay in a second-level cache, and make packing cheap beside them.
constexpr int kTaskPanels = 10;

void check(const AttentionMass& g) {
    for (int i = 0; i < g.rows; ++i) {
        const int a = g.lo[i], b = g.hi[i];
        if (a < 0 || a > b || b > g.keys)
            throw std::invalid_argument("lo and hi must hold 0 <= lo[i] <= hi[i] <= " + std::to_string(g.keys) +
                                        ", the number of keys; got [" + std::to_string(a) + ", " + std::to_string(b) +
                                        ") at row " + std::to_string(i));
    }
}

}  // namespace

void run_attention_mass(const Kernels& k, const AttentionMass& g, int threads) {
    check(g);
    const int panels = (g.keys + kMassPanel - 1) / kMassPanel;
    const int64_t each =
        std::max<int64_t>(2, (panels + int64_t{kTaskPanels} * threads - 1) / (kTaskPanels * int64_t{threads}));
    const int tasks = static_cast<int>(std::min<int64_t>(panels, each * threads));
    const size_t bytes = k.mass_scratch(g.head_dim, std::min(kTaskPanels * kMassPanel, g.keys));
    run_parallel(tasks, threads, [&](int i) {
        thread_local Bytes scratch;
        if (scratch.size() < bytes) {
            scratch = Bytes();  // release before asking for more
            scratch = Bytes(bytes);
        }
        const auto edge = [&](int64_t task) {
            return static_cast<int>(std::min<int64_t>(g.keys, task * panels / tasks * kMassPanel));
        };
        k.attention_mass(g, edge(i), edge(i + 1), scratch.get());
    });
}

}  // namespace fastrerank::cpu
