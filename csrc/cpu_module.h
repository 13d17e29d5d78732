// What the files of the pybind11 interface share: names to values, and what each file adds to the module.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/kernels.h"

// Values that the caller named; std::invalid_argument lists the valid names.
template <class T, size_t N>
T by_name(const std::pair<const char*, T> (&table)[N], const std::string& name, const char* what) {
    std::string valid;
    for (const auto& [key, value] : table) {
        if (name == key) return value;
        valid += std::string(valid.empty() ? "" : ", ") + key;
    }
    throw std::invalid_argument(std::string(what) + " must be one of " + valid + ", got '" + name + "'");
}

inline fastrerank::cpu::Precision precision_of(const std::string& name) {
    using P = fastrerank::cpu::Precision;
    static const std::pair<const char*, P> table[] = {
        {"float32", P::kFloat32}, {"bfloat16", P::kBFloat16}, {"int8", P::kInt8}};
    return by_name(table, name, "dtype");
}
inline const fastrerank::cpu::Kernels* kernels_of(const std::string& name) {
    std::string valid;
    for (int i = 0; i < fastrerank::cpu::kLevels; ++i) {
        const fastrerank::cpu::Kernels* k = fastrerank::cpu::kernels(static_cast<fastrerank::cpu::Isa>(i));
        if (!k) continue;
        if (name == k->name) return k;
        valid += std::string(valid.empty() ? "" : ", ") + k->name;
    }
    throw std::invalid_argument("instruction-set level must be one of those this CPU runs (" + valid + "), got '" +
                                name + "'");
}

// Threads of a call, at least 1; more than any machine has are as good as fewer.
inline int threads_of(int threads) {
    if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
    return std::min(threads, 4096);
}

void add_tensor_ops(pybind11::module_& m);
void add_cur_ops(pybind11::module_& m);
