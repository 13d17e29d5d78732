#include "attention_mass/attention_mass.h"

#include <algorithm>

#include "attention/attention.h"
#include "isa/kernels.h"
#include "runtime/bytes.h"
#include "runtime/parallel.h"

namespace fastrerank::cpu {
namespace {

// Panels of a task: 480 keys. With the queries they fit in a second-level cache, and packing takes little time beside
// the products.
constexpr int kTaskPanels = 10;

}  // namespace

void run_attention_mass(const Kernels& k, const AttentionMass& g, int threads) {
    check_intervals("lo", "hi", g.lo, g.hi, g.rows, g.keys);
    const int panels = (g.keys + kMassPanel - 1) / kMassPanel;
    const int64_t each =
        std::max<int64_t>(2, (panels + int64_t{kTaskPanels} * threads - 1) / (kTaskPanels * int64_t{threads}));
    const int tasks = static_cast<int>(std::min<int64_t>(panels, each * threads));
    const size_t bytes = k.attention_mass_scratch(g.head_dim, std::min(kTaskPanels * kMassPanel, g.keys));
    run_parallel(tasks, threads, [&](int i) {
        const auto edge = [&](int64_t task) {
            return static_cast<int>(std::min<int64_t>(g.keys, task * panels / tasks * kMassPanel));
        };
        k.attention_mass(g, edge(i), edge(i + 1), thread_scratch(bytes));
    });
}

}  // namespace fastrerank::cpu
