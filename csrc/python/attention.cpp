// The interface to ops.attention, for tensors that Python has checked: addresses, and strides in elements.
#include "attention/attention.h"

#include <array>

#include "python/module.h"

namespace fastrerank::python {

using namespace cpu;

namespace {

// Strides: row and head of q, k, v and out. lo, hi, plo and phi point to int32; plo, phi and lse may be 0.
void attention(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, uintptr_t lo, uintptr_t hi,
               uintptr_t plo, uintptr_t phi, int rows, int keys, int heads, int kv_heads, int head_dim,
               const std::array<int64_t, 8>& strides, const std::string& dtype, float scale, float softcap, int threads,
               const std::string& isa) {
    const Precision precision = precision_of(dtype);
    if (precision == Precision::kInt8) throw std::invalid_argument("dtype must be one of float32, bfloat16");
    const auto& s = strides;
    const Attention g{.q = at(q),
                      .k = at(k),
                      .v = at(v),
                      .out = at(out),
                      .lse = at<float>(lse),
                      .q_row = s[0],
                      .q_head = s[1],
                      .k_row = s[2],
                      .k_head = s[3],
                      .v_row = s[4],
                      .v_head = s[5],
                      .out_row = s[6],
                      .out_head = s[7],
                      .format = precision == Precision::kFloat32 ? Format::kF32 : Format::kBF16,
                      .heads = heads,
                      .group = heads / kv_heads,
                      .head_dim = head_dim,
                      .scale = scale,
                      .softcap = softcap,
                      .lo = {at<int32_t>(plo), at<int32_t>(lo)},
                      .hi = {at<int32_t>(phi), at<int32_t>(hi)}};
    const Kernels& level = kernels_of(isa);
    threads = threads_of(threads);
    on_openmp([&] { run_attention(level, g, rows, keys, threads); });
}

const Part part([](py::module_& m) {
    m.def("attention", &attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
          py::arg("lo"), py::arg("hi"), py::arg("plo"), py::arg("phi"), py::arg("rows"), py::arg("keys"),
          py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("strides"), py::arg("dtype"),
          py::arg("scale"), py::arg("softcap"), py::arg("threads"), py::arg("isa"));
});

}  // namespace
}  // namespace fastrerank::python
