// The interface to ops.max_sim.
#include "max_sim/max_sim.h"

#include "python/module.h"

namespace fastrerank::python {

using namespace cpu;

namespace {

F32Array max_sim(const F32Array& query, const F32Array& tokens, const I64Array& offsets, int threads,
                 const std::string& isa) {
    if (query.ndim() != 2 || tokens.ndim() != 2 || query.shape(1) != tokens.shape(1))
        throw std::invalid_argument("query and tokens must be float32 matrices of the same width");
    if (query.shape(0) < 1) throw std::invalid_argument("query must have at least one token");
    check_offsets(offsets, tokens.shape(0));
    const Kernels& k = kernels_of(isa);
    threads = threads_of(threads);
    const int documents = static_cast<int>(offsets.size() - 1);
    F32Array out(documents);
    float* o = out.mutable_data();
    without_gil([&] {
        run_max_sim(k, query.data(), static_cast<int>(query.shape(0)), static_cast<int>(query.shape(1)), tokens.data(),
                    offsets.data(), documents, threads, o);
    });
    return out;
}

const Part part([](py::module_& m) {
    m.def("max_sim", &max_sim, py::arg("query"), py::arg("tokens"), py::arg("offsets"), py::arg("threads"),
          py::arg("isa"));
});

}  // namespace
}  // namespace fastrerank::python
