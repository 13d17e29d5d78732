// The interface to norms of rows on the CPU, for tensors that Python has checked: addresses, and strides in elements.
#include "norm_rows/norm_rows.h"

#include "python/module.h"

namespace fastrerank::python {

using namespace cpu;

namespace {

// x (rows, width) and y (rows, y_row) in dtype, float32 or bfloat16; gamma and beta (width,) point to float32 or are 0.
void norm_rows(uintptr_t x, const std::string& dtype, int64_t x_row, int64_t rows, int width, const std::string& norm,
               uintptr_t gamma, uintptr_t beta, float eps, uintptr_t y, int64_t y_row, int threads,
               const std::string& isa) {
    NormRows g{};
    g.x = at(x), g.x_source = source_of(dtype), g.ldx = x_row, g.rows = rows, g.n = width;
    g.norm = norm_of(norm), g.gamma = at<float>(gamma), g.beta = at<float>(beta), g.eps = eps;
    if (g.x_source == Source::kF16) throw std::invalid_argument("norm_rows takes float32 or bfloat16 rows");
    const Kernels& level = kernels_of(isa);
    threads = threads_of(threads);
    on_openmp([&] { run_norm_rows(level, g, at(y), y_row, threads); });
}

const Part part([](py::module_& m) {
    m.def("norm_rows", &norm_rows, py::arg("x"), py::arg("dtype"), py::arg("x_row"), py::arg("rows"), py::arg("width"),
          py::arg("norm"), py::arg("gamma"), py::arg("beta"), py::arg("eps"), py::arg("y"), py::arg("y_row"),
          py::arg("threads"), py::arg("isa"));
});

}  // namespace
}  // namespace fastrerank::python
