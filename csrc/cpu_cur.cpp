// The interface to top-k scans of packed items, whose arguments Python has checked: pointers as integers (0: none).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/cur_topk.h"
#include "cpu_module.h"
#include "cuda/reservoir.h"
#include "without_gil.h"

namespace py = pybind11;
using namespace fastrerank::cpu;

namespace {

// shards: (tiles, scale, exact tiles, count). Returns what was wrong (0: nothing, 1: a NaN score, 2: exact tiles of
// other items, 3: a query that is not finite), and with which query and item or value.
std::tuple<int, int64_t, int64_t> cur_topk(const std::vector<std::array<int64_t, 4>>& shards,
                                           const std::string& storage, const std::string& exact_storage, bool rounded,
                                           int width, uintptr_t anchor_scale, uintptr_t queries, int64_t rows,
                                           int64_t k, uintptr_t left_out, uintptr_t left_out_begin, uintptr_t ids,
                                           uintptr_t scores, int threads, const std::string& isa) {
    CurTopk g{};
    g.storage = precision_of(storage), g.exact_storage = precision_of(exact_storage), g.rounded = rounded;
    g.width = width, g.anchor_scale = reinterpret_cast<const float*>(anchor_scale);
    for (const auto& s : shards)
        g.shards.push_back({reinterpret_cast<const char*>(s[0]), reinterpret_cast<const float*>(s[1]),
                            reinterpret_cast<const char*>(s[2]), s[3]});
    g.queries = reinterpret_cast<const float*>(queries), g.rows = rows, g.k = k;
    g.left_out = reinterpret_cast<const int64_t*>(left_out);
    const std::vector<int64_t> none(left_out_begin ? 0 : rows + 1);
    g.left_out_begin = left_out_begin ? reinterpret_cast<const int64_t*>(left_out_begin) : none.data();
    g.ids = reinterpret_cast<int64_t*>(ids), g.scores = reinterpret_cast<float*>(scores);
    const Kernels& level = *kernels_of(isa);
    threads = threads_of(threads);
    CurFault fault;
    without_gil([&] { fault = run_cur_topk(level, g, threads); });
    return {static_cast<int>(fault.kind), fault.row, fault.item};
}

struct HostLanes {
    int lane = 0, count = 1;
    void barrier() const {}
    int add(int* n) const { return (*n)++; }
    bool any(bool x) const { return x; }
};

// The selection of the CUDA kernels, run by one host thread: every block's k best of its batches of scores, and the
// k best of those.
std::pair<std::vector<int32_t>, std::vector<float>> reservoir_topk(const std::vector<float>& scores, int k, int batch,
                                                                   int blocks) {
    using namespace fastrerank::cuda;
    constexpr int64_t kMost = 1 << 20;
    if (k < 1 || batch < 1 || blocks < 1 || k > kMost || batch > kMost || int64_t{k} * blocks > 16 * kMost)
        throw std::invalid_argument("k, batch and blocks must be at least 1 and of a device's size");
    const int size = reservoir_size(k, batch);
    std::vector<Entry> best(static_cast<size_t>(blocks) * k, kNoEntry);
    const auto barrier = [] {};
    for (int block = 0; block < blocks; ++block) {
        std::vector<Entry> entries(size);
        Entry threshold = kNoEntry;
        int count = 0;
        for (size_t begin = static_cast<size_t>(block) * batch; begin < scores.size();
             begin += static_cast<size_t>(batch) * blocks) {
            for (size_t i = begin; i < std::min(begin + batch, scores.size()); ++i) {
                const Entry e = entry_of(scores[i], static_cast<int32_t>(i));
                if (e > threshold) entries[count++] = e;
            }
            if (count + batch <= size) continue;
            cut_back(entries.data(), size, count, 0, 1, barrier);
            threshold = count >= k ? entries[k - 1] : kNoEntry;
            count = std::min(count, k);
        }
        cut_back(entries.data(), size, count, 0, 1, barrier);
        std::copy_n(entries.begin(), k, best.begin() + static_cast<size_t>(block) * k);
    }
    std::vector<Entry> merged(reservoir_size(k, 1));
    Entry threshold = kNoEntry;
    int filled = 0;
    merge_lists(best.data(), blocks, k, merged.data(), static_cast<int>(merged.size()), &filled, &threshold,
                HostLanes());
    std::pair<std::vector<int32_t>, std::vector<float>> result;
    for (int i = 0; i < k && merged[i] != kNoEntry; ++i) {
        result.first.push_back(id_of(merged[i]));
        result.second.push_back(score_of(merged[i]));
    }
    return result;
}

}  // namespace

void add_cur_ops(py::module_& m) {
    m.def("reservoir_topk", &reservoir_topk, py::arg("scores"), py::arg("k"), py::arg("batch"), py::arg("blocks"));
    m.def("cur_topk", &cur_topk, py::arg("shards"), py::arg("storage"), py::arg("exact_storage"), py::arg("rounded"),
          py::arg("width"), py::arg("anchor_scale"), py::arg("queries"), py::arg("rows"), py::arg("k"),
          py::arg("left_out"), py::arg("left_out_begin"), py::arg("ids"), py::arg("scores"), py::arg("threads"),
          py::arg("isa"));
}
