// The module `_cpu`: its parts, and the functions that belong to no op.
#include <string>
#include <vector>

#include "peak/peak.h"
#include "python/module.h"

namespace fastrerank::python {

using namespace cpu;

namespace {

std::vector<std::string> levels() {
    std::vector<std::string> names;
    for (int i = 0; i < kLevels; ++i)
        if (const Kernels* k = kernels(static_cast<Isa>(i))) names.emplace_back(k->name);
    return names;
}

double peak(const std::string& dtype, int threads, const std::string& isa) {
    const Kernels& k = kernels_of(isa);
    const Precision precision = precision_of(dtype);
    threads = threads_of(threads);
    double best = 0;
    without_gil([&] { best = run_peak(k, precision, threads); });
    return best;
}

const Part part([](py::module_& m) {
    m.def("levels", &levels, "Instruction-set levels that this CPU runs, lowest first.");
    m.def("set_openmp", [](uintptr_t start) { set_openmp(reinterpret_cast<StartOpenMp>(start)); }, py::arg("start"));
    // Lets _cpu_tests run the kernels of this module.
    m.attr("kernels") = py::capsule(reinterpret_cast<void*>(&kernels), "fastrerank.kernels");
    m.def("peak", &peak, py::arg("dtype"), py::arg("threads"), py::arg("isa"));
});

}  // namespace
}  // namespace fastrerank::python

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "fastrerank's CPU kernels; use them through fastrerank.ops.";
    fastrerank::python::Part::add_all(m);
}
