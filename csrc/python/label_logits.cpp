// The interface to ops.label_logits, for tensors that Python has checked: addresses, and strides in elements.
#include "label_logits/label_logits.h"

#include "python/module.h"

namespace fastrerank::python {

using namespace cpu;

namespace {

// Row strides of hidden (rows, width) and weight (labels, width). gamma and beta (width,) and bias (labels,) point to
// float32 or are 0; order (rows, labels) points to int32 or is 0.
void label_logits(uintptr_t hidden, const std::string& hidden_dtype, int64_t hidden_row, int64_t rows, uintptr_t weight,
                  const std::string& weight_dtype, int64_t weight_row, int labels, int width, const std::string& norm,
                  uintptr_t gamma, uintptr_t beta, float eps, uintptr_t bias, float scale, float softcap,
                  uintptr_t logits, uintptr_t order, int threads, const std::string& isa) {
    LabelLogits g{};
    g.x = at(hidden), g.x_source = source_of(hidden_dtype), g.ldx = hidden_row;
    g.w = at(weight), g.w_source = source_of(weight_dtype), g.ldw = weight_row;
    g.rows = rows, g.labels = labels, g.n = width;
    g.norm = norm_of(norm), g.gamma = at<float>(gamma), g.beta = at<float>(beta), g.eps = eps;
    g.bias = at<float>(bias), g.scale = scale, g.softcap = softcap;
    g.out = at<float>(logits);
    const Kernels& level = kernels_of(isa);
    threads = threads_of(threads);
    on_openmp([&] { run_label_logits(level, g, at<int32_t>(order), threads); });
}

const Part part([](py::module_& m) {
    m.def("label_logits", &label_logits, py::arg("hidden"), py::arg("hidden_dtype"), py::arg("hidden_row"),
          py::arg("rows"), py::arg("weight"), py::arg("weight_dtype"), py::arg("weight_row"), py::arg("labels"),
          py::arg("width"), py::arg("norm"), py::arg("gamma"), py::arg("beta"), py::arg("eps"), py::arg("bias"),
          py::arg("scale"), py::arg("softcap"), py::arg("logits"), py::arg("order"), py::arg("threads"),
          py::arg("isa"));
});

}  // namespace
}  // namespace fastrerank::python
