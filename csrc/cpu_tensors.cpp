// The interface to the ops on tensors that the caller has checked: pointers as integers (0: none), strides in elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "cpu/attention_mass.h"
#include "cpu/interval.h"
#include "cpu/kernels.h"
#include "cpu/label_logits.h"
#include "cpu/parallel.h"
#include "cpu_module.h"
#include "without_gil.h"

namespace py = pybind11;
using namespace fastrerank::cpu;

namespace {

Source source_of(const std::string& name) {
    static const std::pair<const char*, Source> table[] = {
        {"float32", Source::kF32}, {"float16", Source::kF16}, {"bfloat16", Source::kBF16}};
    return by_name(table, name, "dtype");
}
RowNorm norm_of(const std::string& name) {
    static const std::pair<const char*, RowNorm> table[] = {
        {"none", RowNorm::kNone}, {"rms", RowNorm::kRms}, {"layer", RowNorm::kLayer}};
    return by_name(table, name, "norm");
}
const float* floats(uintptr_t p) { return reinterpret_cast<const float*>(p); }

// Strides: row and head of q, k, v and out. lo, hi, plo and phi point to int32; plo, phi and lse may be 0.
void attention(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, uintptr_t lo, uintptr_t hi,
               uintptr_t plo, uintptr_t phi, int rows, int keys, int heads, int kv_heads, int head_dim,
               const std::array<int64_t, 8>& strides, const std::string& dtype, float scale, float softcap, int threads,
               const std::string& isa) {
    const Precision precision = precision_of(dtype);
    if (precision == Precision::kInt8) throw std::invalid_argument("dtype must be one of float32, bfloat16");
    const auto integers = [](uintptr_t p) { return reinterpret_cast<const int32_t*>(p); };
    const auto& s = strides;
    const IntervalAttention g{reinterpret_cast<const char*>(q),
                              reinterpret_cast<const char*>(k),
                              reinterpret_cast<const char*>(v),
                              reinterpret_cast<char*>(out),
                              reinterpret_cast<float*>(lse),
                              s[0],
                              s[1],
                              s[2],
                              s[3],
                              s[4],
                              s[5],
                              s[6],
                              s[7],
                              precision == Precision::kFloat32 ? Format::kF32 : Format::kBF16,
                              heads,
                              heads / kv_heads,
                              head_dim,
                              scale,
                              softcap,
                              {integers(plo), integers(lo)},
                              {integers(phi), integers(hi)}};
    const Kernels& level = *kernels_of(isa);
    threads = threads_of(threads);
    without_gil([&] {
        const OnOpenMp workers;
        run_interval_attention(level, g, rows, keys, threads);
    });
}

// Strides: row and head of q and k, head of out. head_weight may be 0; out (keys,), or (heads, keys) if per_head.
void attention_mass(uintptr_t q, uintptr_t k, uintptr_t lse, uintptr_t lo, uintptr_t hi, uintptr_t row_weight,
                    uintptr_t head_weight, uintptr_t out, int rows, int keys, int heads, int kv_heads, int head_dim,
                    const std::array<int64_t, 5>& strides, const std::string& dtype, float scale, float softcap,
                    bool per_head, int threads, const std::string& isa) {
    AttentionMass g{};
    g.q = reinterpret_cast<const void*>(q), g.k = reinterpret_cast<const void*>(k), g.source = source_of(dtype);
    g.q_row = strides[0], g.q_head = strides[1], g.k_row = strides[2], g.k_head = strides[3], g.out_head = strides[4];
    g.rows = rows, g.keys = keys, g.heads = heads, g.group = heads / kv_heads, g.head_dim = head_dim;
    g.lse = floats(lse), g.row_weight = floats(row_weight), g.head_weight = floats(head_weight);
    g.lo = reinterpret_cast<const int32_t*>(lo), g.hi = reinterpret_cast<const int32_t*>(hi);
    g.scale = scale, g.softcap = softcap, g.per_head = per_head, g.out = reinterpret_cast<float*>(out);
    const Kernels& level = *kernels_of(isa);
    threads = threads_of(threads);
    without_gil([&] {
        const OnOpenMp workers;
        run_attention_mass(level, g, threads);
    });
}

// Row strides of hidden (rows, width) and weight (labels, width). gamma and beta (width,) and bias (labels,) point to
// float32 or are 0; order (rows, labels) points to int32 or is 0.
void label_logits(uintptr_t hidden, const std::string& hidden_dtype, int64_t hidden_row, int64_t rows, uintptr_t weight,
                  const std::string& weight_dtype, int64_t weight_row, int labels, int width, const std::string& norm,
                  uintptr_t gamma, uintptr_t beta, float eps, uintptr_t bias, float scale, float softcap,
                  uintptr_t logits, uintptr_t order, int threads, const std::string& isa) {
    LabelLogits g{};
    g.x = reinterpret_cast<const void*>(hidden), g.x_source = source_of(hidden_dtype), g.ldx = hidden_row;
    g.w = reinterpret_cast<const void*>(weight), g.w_source = source_of(weight_dtype), g.ldw = weight_row;
    g.rows = rows, g.labels = labels, g.n = width;
    g.norm = norm_of(norm), g.gamma = floats(gamma), g.beta = floats(beta), g.eps = eps;
    g.bias = floats(bias), g.scale = scale, g.softcap = softcap;
    g.out = reinterpret_cast<float*>(logits);
    const Kernels& level = *kernels_of(isa);
    threads = threads_of(threads);
    without_gil([&] {
        const OnOpenMp workers;
        run_label_logits(level, g, reinterpret_cast<int32_t*>(order), threads);
    });
}

// x (rows, width) and y (rows, y_row) in dtype, float32 or bfloat16; gamma and beta as above.
void norm_rows(uintptr_t x, const std::string& dtype, int64_t x_row, int64_t rows, int width, const std::string& norm,
               uintptr_t gamma, uintptr_t beta, float eps, uintptr_t y, int64_t y_row, int threads,
               const std::string& isa) {
    LabelLogits g{};
    g.x = reinterpret_cast<const void*>(x), g.x_source = source_of(dtype), g.ldx = x_row, g.rows = rows, g.n = width;
    g.norm = norm_of(norm), g.gamma = floats(gamma), g.beta = floats(beta), g.eps = eps;
    if (g.x_source == Source::kF16) throw std::invalid_argument("norm_rows takes float32 or bfloat16 rows");
    const Kernels& level = *kernels_of(isa);
    threads = threads_of(threads);
    without_gil([&] {
        const OnOpenMp workers;
        run_norm_rows(level, g, reinterpret_cast<void*>(y), y_row, threads);
    });
}

}  // namespace

void add_tensor_ops(py::module_& m) {
    m.def("set_openmp", [](uintptr_t start) { set_openmp(reinterpret_cast<StartOpenMp>(start)); }, py::arg("start"));
    m.def("norm_rows", &norm_rows, py::arg("x"), py::arg("dtype"), py::arg("x_row"), py::arg("rows"), py::arg("width"),
          py::arg("norm"), py::arg("gamma"), py::arg("beta"), py::arg("eps"), py::arg("y"), py::arg("y_row"),
          py::arg("threads"), py::arg("isa"));
    m.def("attention", &attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
          py::arg("lo"), py::arg("hi"), py::arg("plo"), py::arg("phi"), py::arg("rows"), py::arg("keys"),
          py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("strides"), py::arg("dtype"),
          py::arg("scale"), py::arg("softcap"), py::arg("threads"), py::arg("isa"));
    m.def("attention_mass", &attention_mass, py::arg("q"), py::arg("k"), py::arg("lse"), py::arg("lo"), py::arg("hi"),
          py::arg("row_weight"), py::arg("head_weight"), py::arg("out"), py::arg("rows"), py::arg("keys"),
          py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("strides"), py::arg("dtype"),
          py::arg("scale"), py::arg("softcap"), py::arg("per_head"), py::arg("threads"), py::arg("isa"));
    m.def("label_logits", &label_logits, py::arg("hidden"), py::arg("hidden_dtype"), py::arg("hidden_row"),
          py::arg("rows"), py::arg("weight"), py::arg("weight_dtype"), py::arg("weight_row"), py::arg("labels"),
          py::arg("width"), py::arg("norm"), py::arg("gamma"), py::arg("beta"), py::arg("eps"), py::arg("bias"),
          py::arg("scale"), py::arg("softcap"), py::arg("logits"), py::arg("order"), py::arg("threads"),
          py::arg("isa"));
}
