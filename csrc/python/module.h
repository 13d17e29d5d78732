// Shared by the files of the pybind11 modules: parts of a module, checks of arguments, and calls without the GIL.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "isa/kernels.h"
#include "python/without_gil.h"
#include "runtime/parallel.h"

namespace fastrerank::python {

namespace py = pybind11;

using F32Array = py::array_t<float, py::array::c_style>;
using I32Array = py::array_t<int32_t, py::array::c_style>;
using I64Array = py::array_t<int64_t, py::array::c_style>;

// A file registers what it adds to the module: `const Part part([](py::module_& m) { m.def(..); });`
struct Part {
    using Add = void (*)(py::module_&);
    explicit Part(Add add);
    static void add_all(py::module_& m);
};

// The value of a name; std::invalid_argument lists the valid names.
template <class T, size_t N>
T by_name(const std::pair<const char*, T> (&table)[N], const std::string& name, const char* what) {
    std::string valid;
    for (const auto& [key, value] : table) {
        if (name == key) return value;
        valid += std::string(valid.empty() ? "" : ", ") + key;
    }
    throw std::invalid_argument(std::string(what) + " must be one of " + valid + ", got '" + name + "'");
}
cpu::Activation activation_of(const std::string& name);
cpu::Precision precision_of(const std::string& name);
cpu::Source source_of(const std::string& name);
cpu::RowNorm norm_of(const std::string& name);
const cpu::Kernels& kernels_of(const std::string& isa);

// Threads of a call, at least 1, and at most as many as any machine has.
int threads_of(int threads);

// A float32, float16 or (as uint16) bfloat16 matrix whose rows are contiguous.
struct Weight {
    const void* data;
    cpu::Source source;
    int64_t ld;
    int n, k;
};
Weight weight_of(const py::array& a, const char* what);
const float* vector_of(const std::optional<F32Array>& a, int64_t n, const char* what);
void check_offsets(const I64Array& offsets, int64_t tokens);

// Converts an address from Python to a pointer; 0 becomes null. Python has checked the tensor.
template <class T = char>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Calls f without the GIL, on the workers of torch.
template <class F>
void on_openmp(const F& f) {
    without_gil([&] {
        const cpu::OnOpenMp workers;
        f();
    });
}

}  // namespace fastrerank::python
