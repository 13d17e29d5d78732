// The interface to ops.attention_mass, for tensors that Python has checked: addresses, and strides in elements.
#include "attention_mass/attention_mass.h"

#include <array>

#include "python/module.h"

namespace fastrerank::python {

using namespace cpu;

namespace {

// Strides: row and head of q and k, head of out. head_weight may be 0; out (keys,), or (heads, keys) if per_head.
void attention_mass(uintptr_t q, uintptr_t k, uintptr_t lse, uintptr_t lo, uintptr_t hi, uintptr_t row_weight,
                    uintptr_t head_weight, uintptr_t out, int rows, int keys, int heads, int kv_heads, int head_dim,
                    const std::array<int64_t, 5>& strides, const std::string& dtype, float scale, float softcap,
                    bool per_head, int threads, const std::string& isa) {
    AttentionMass g{};
    g.q = at(q), g.k = at(k), g.source = source_of(dtype);
    g.q_row = strides[0], g.q_head = strides[1], g.k_row = strides[2], g.k_head = strides[3], g.out_head = strides[4];
    g.rows = rows, g.keys = keys, g.heads = heads, g.group = heads / kv_heads, g.head_dim = head_dim;
    g.lse = at<float>(lse), g.row_weight = at<float>(row_weight), g.head_weight = at<float>(head_weight);
    g.lo = at<int32_t>(lo), g.hi = at<int32_t>(hi);
    g.scale = scale, g.softcap = softcap, g.per_head = per_head, g.out = at<float>(out);
    const Kernels& level = kernels_of(isa);
    threads = threads_of(threads);
    on_openmp([&] { run_attention_mass(level, g, threads); });
}

const Part part([](py::module_& m) {
    m.def("attention_mass", &attention_mass, py::arg("q"), py::arg("k"), py::arg("lse"), py::arg("lo"), py::arg("hi"),
          py::arg("row_weight"), py::arg("head_weight"), py::arg("out"), py::arg("rows"), py::arg("keys"),
          py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("strides"), py::arg("dtype"),
          py::arg("scale"), py::arg("softcap"), py::arg("per_head"), py::arg("threads"), py::arg("isa"));
});

}  // namespace
}  // namespace fastrerank::python
