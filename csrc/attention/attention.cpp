#include "attention/attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "isa/kernels.h"
#include "runtime/bytes.h"
#include "runtime/parallel.h"

namespace fastrerank::cpu {
namespace {

// Queries of a task: enough that packing a block of keys takes little time beside the products with it.
constexpr int kTaskQueries = 256;

void check(const Attention& g, int rows, int keys) {
    if (g.lo[0]) check_intervals("plo", "phi", g.lo[0], g.hi[0], rows, keys);
    if (g.lo[1]) check_intervals("lo", "hi", g.lo[1], g.hi[1], rows, keys);
    if (!g.lo[0] || !g.lo[1]) return;
    for (int i = 0; i < rows; ++i) {
        const int begin = std::max(g.lo[0][i], g.lo[1][i]), end = std::min(g.hi[0][i], g.hi[1][i]);
        const bool both = g.lo[0][i] < g.hi[0][i] && g.lo[1][i] < g.hi[1][i];
        if (both && begin < end)
            throw std::invalid_argument("[plo, phi) and [lo, hi) of a row must not overlap; both hold key " +
                                        std::to_string(begin) + " at row " + std::to_string(i));
    }
}

std::vector<KeyRun> runs_of(const int32_t* lo, const int32_t* hi, int rows, const std::vector<char>& left_out) {
    std::vector<KeyRun> runs;
    if (!lo) return runs;
    const auto step = [](int from, int to) { return to == from || to == from + 1; };
    for (int i = 0; i < rows; ++i) {
        if (lo[i] >= hi[i] || left_out[i]) continue;
        const bool joins = !runs.empty() && runs.back().row_end == i && step(lo[i - 1], lo[i]) &&
                           step(hi[i - 1], hi[i]) && lo[i] < hi[i - 1];
        if (joins)
            runs.back().row_end = i + 1;
        else
            runs.push_back({i, i + 1, lo[i], 0, 0});
    }
    return runs;
}

// Joins runs of own keys with a prefix that all of their rows see completely; returns which rows are joined.
std::vector<char> join_prefixes(const Attention& g, std::vector<KeyRun>& own, int rows) {
    std::vector<char> joined(rows, 0);
    if (!g.lo[0]) return joined;
    for (KeyRun& run : own) {
        const int first = run.row_begin, begin = g.lo[0][first], end = g.hi[0][first];
        bool same = begin < end;
        for (int i = first; i < run.row_end && same; ++i)
            same = g.lo[1][i] == run.key_begin && g.lo[0][i] == begin && g.hi[0][i] == end;
        if (!same) continue;
        run.prefix_begin = begin;
        run.prefix_keys = end - begin;
        std::fill(joined.begin() + run.row_begin, joined.begin() + run.row_end, 1);
    }
    return joined;
}

}  // namespace

void check_intervals(const char* lo_name, const char* hi_name, const int32_t* lo, const int32_t* hi, int rows,
                     int keys) {
    for (int i = 0; i < rows; ++i) {
        if (0 <= lo[i] && lo[i] <= hi[i] && hi[i] <= keys) continue;
        const std::string a = lo_name, b = hi_name;
        throw std::invalid_argument(a + " and " + b + " must hold 0 <= " + a + "[i] <= " + b + "[i] <= " +
                                    std::to_string(keys) + ", the number of keys; got [" + std::to_string(lo[i]) +
                                    ", " + std::to_string(hi[i]) + ") at row " + std::to_string(i));
    }
}

void run_attention(const Kernels& k, const Attention& g, int rows, int keys, int threads) {
    check(g, rows, keys);
    std::vector<KeyRun> own = runs_of(g.lo[1], g.hi[1], rows, std::vector<char>(rows, 0));
    const std::vector<char> joined = join_prefixes(g, own, rows);
    const std::vector<KeyRun> runs[2] = {runs_of(g.lo[0], g.hi[0], rows, joined), std::move(own)};
    const int kv_heads = g.heads / g.group;
    // A task takes whole runs of own keys where they fit, and smaller pieces where there would be too few tasks for the
    // threads.
    const int most = std::max(1, kTaskQueries / g.group);
    const int64_t fair = static_cast<int64_t>(rows) * kv_heads / (4 * static_cast<int64_t>(threads)) + 1;
    const int target = static_cast<int>(std::min<int64_t>(most, std::max<int64_t>(16, fair)));
    std::vector<AttentionTask> tasks;
    const KeyRun* at[2] = {runs[0].data(), runs[1].data()};
    const KeyRun* const end[2] = {at[0] + runs[0].size(), at[1] + runs[1].size()};
    for (int row = 0; row < rows;) {
        AttentionTask task{0, row, std::min(rows, row + target), {}, {end[0], end[1]}, nullptr};
        for (int list = 0; list < 2; ++list) {
            while (at[list] != end[list] && at[list]->row_end <= row) ++at[list];
            task.runs[list] = at[list];
        }
        const KeyRun* cut = at[1];
        while (cut != end[1] && cut->row_end <= task.row_end) ++cut;
        if (cut != end[1] && cut->row_begin > row && cut->row_begin < task.row_end) task.row_end = cut->row_begin;
        row = task.row_end;
        for (task.kv_head = 0; task.kv_head < kv_heads; ++task.kv_head) tasks.push_back(task);
    }
    const size_t bytes = k.attention_scratch(g.head_dim, target * g.group);
    run_parallel(static_cast<int>(tasks.size()), threads, [&](int i) {
        AttentionTask task = tasks[i];
        task.scratch = thread_scratch(bytes);
        k.attention(g, task);
    });
}

}  // namespace fastrerank::cpu
