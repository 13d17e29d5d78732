// The interface to ops.cur_topk, for memory that Python has checked: addresses, 0 for none.
#include "cur_topk/cur_topk.h"

#include <array>
#include <tuple>
#include <vector>

#include "python/module.h"

namespace fastrerank::python {

using namespace cpu;

namespace {

// shards: (tiles, scale, exact tiles, count). Returns the fault (0: none, 1: a NaN score, 2: exact tiles of other
// items, 3: a query that is not finite), its query, and its item or value.
std::tuple<int, int64_t, int64_t> cur_topk(const std::vector<std::array<int64_t, 4>>& shards,
                                           const std::string& storage, const std::string& exact_storage, bool rounded,
                                           int width, uintptr_t anchor_scale, uintptr_t queries, int64_t rows,
                                           int64_t k, uintptr_t left_out, uintptr_t left_out_begin, uintptr_t ids,
                                           uintptr_t scores, int threads, const std::string& isa) {
    CurTopk g{};
    g.storage = precision_of(storage), g.exact_storage = precision_of(exact_storage), g.rounded = rounded;
    g.width = width, g.anchor_scale = at<float>(anchor_scale);
    for (const auto& s : shards)
        g.shards.push_back({reinterpret_cast<const char*>(s[0]), reinterpret_cast<const float*>(s[1]),
                            reinterpret_cast<const char*>(s[2]), s[3]});
    g.queries = at<float>(queries), g.rows = rows, g.k = k;
    g.left_out = at<int64_t>(left_out);
    const std::vector<int64_t> none(left_out_begin ? 0 : rows + 1);
    g.left_out_begin = left_out_begin ? at<int64_t>(left_out_begin) : none.data();
    g.ids = at<int64_t>(ids), g.scores = at<float>(scores);
    const Kernels& level = kernels_of(isa);
    threads = threads_of(threads);
    CurFault fault;
    without_gil([&] { fault = run_cur_topk(level, g, threads); });
    return {static_cast<int>(fault.kind), fault.row, fault.item};
}

const Part part([](py::module_& m) {
    m.def("cur_topk", &cur_topk, py::arg("shards"), py::arg("storage"), py::arg("exact_storage"), py::arg("rounded"),
          py::arg("width"), py::arg("anchor_scale"), py::arg("queries"), py::arg("rows"), py::arg("k"),
          py::arg("left_out"), py::arg("left_out_begin"), py::arg("ids"), py::arg("scores"), py::arg("threads"),
          py::arg("isa"));
});

}  // namespace
}  // namespace fastrerank::python
