// The interface to packed linear layers: weights as NumPy arrays, rows of tensors as addresses and strides in elements.
#include "linear/packed_linear.h"

#include "python/module.h"

namespace fastrerank::python {

using namespace cpu;

namespace {

PackedLinear make(const py::array& w, const std::optional<F32Array>& bias, const std::string& dtype,
                  const std::string& isa) {
    const Kernels& k = kernels_of(isa);
    const Weight m = weight_of(w, "w");
    return {k, precision_of(dtype), m.data, m.source, m.ld, m.n, m.k, vector_of(bias, m.n, "bias")};
}

void run(const PackedLinear& linear, uintptr_t x, int64_t ldx, int64_t rows, uintptr_t y, int64_t ldy, int threads) {
    threads = threads_of(threads);
    on_openmp([&] { linear.run(at(x), ldx, rows, at(y), ldy, threads); });
}

void feed_forward(const PackedLinear& gate, const PackedLinear& down, const PackedLinear* up,
                  const std::string& activation, uintptr_t x, int64_t ldx, int64_t rows, uintptr_t y, int64_t ldy,
                  int threads) {
    threads = threads_of(threads);
    const Activation act = activation_of(activation);
    on_openmp([&] { run_feed_forward(gate, down, up, act, at(x), ldx, rows, at(y), ldy, threads); });
}

const Part part([](py::module_& m) {
    py::class_<PackedLinear>(m, "Linear")
        .def(py::init(&make), py::arg("w"), py::arg("bias").none(true), py::arg("dtype"), py::arg("isa"))
        .def("run_feed_forward", &feed_forward, py::arg("down"), py::arg("up").none(true), py::arg("activation"),
             py::arg("x"), py::arg("ldx"), py::arg("rows"), py::arg("y"), py::arg("ldy"), py::arg("threads"))
        .def("run", &run, py::arg("x"), py::arg("ldx"), py::arg("rows"), py::arg("y"), py::arg("ldy"),
             py::arg("threads"));
});

}  // namespace
}  // namespace fastrerank::python
