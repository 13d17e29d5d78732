// Parts of the modules, and checks of arguments.
#include "python/module.h"

#include <vector>

namespace fastrerank::python {

using namespace cpu;

namespace {
std::vector<Part::Add>& parts() {
    static std::vector<Part::Add> all;
    return all;
}
}  // namespace

Part::Part(Add add) { parts().push_back(add); }
void Part::add_all(py::module_& m) {
    for (const Add add : parts()) add(m);
}

Activation activation_of(const std::string& name) {
    static const std::pair<const char*, Activation> table[] = {
        {"identity", Activation::kIdentity}, {"gelu", Activation::kGelu}, {"gelu_tanh", Activation::kGeluTanh},
        {"relu", Activation::kRelu},         {"tanh", Activation::kTanh}, {"silu", Activation::kSilu},
        {"sigmoid", Activation::kSigmoid}};
    return by_name(table, name, "activation");
}
Precision precision_of(const std::string& name) {
    static const std::pair<const char*, Precision> table[] = {
        {"float32", Precision::kFloat32}, {"bfloat16", Precision::kBFloat16}, {"int8", Precision::kInt8}};
    return by_name(table, name, "dtype");
}
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
const Kernels& kernels_of(const std::string& isa) {
    std::string valid;
    for (int i = 0; i < kLevels; ++i) {
        const Kernels* k = kernels(static_cast<Isa>(i));
        if (!k) continue;
        if (isa == k->name) return *k;
        valid += std::string(valid.empty() ? "" : ", ") + k->name;
    }
    throw std::invalid_argument("instruction-set level must be one of those this CPU runs (" + valid + "), got '" +
                                isa + "'");
}

int threads_of(int threads) {
    if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
    return std::min(threads, 4096);
}

Weight weight_of(const py::array& a, const char* what) {
    if (a.ndim() != 2) throw std::invalid_argument(std::string(what) + " must be a matrix");
    const char kind = a.dtype().kind();
    const auto size = a.itemsize();
    Source source;
    if (kind == 'f' && size == 4)
        source = Source::kF32;
    else if (kind == 'f' && size == 2)
        source = Source::kF16;
    else if (kind == 'u' && size == 2)
        source = Source::kBF16;
    else
        throw std::invalid_argument(std::string(what) + " must be float32, float16 or bfloat16 (as uint16)");
    if (a.dtype().byteorder() == '>')  // NumPy says '=' for the machine's own order
        throw std::invalid_argument(std::string(what) + " must be in the machine's byte order");
    constexpr py::ssize_t most = 1 << 30;
    if (a.shape(0) < 1 || a.shape(1) < 1 || a.shape(0) > most || a.shape(1) > most)
        throw std::invalid_argument(std::string(what) + " must have 1 to 2^30 rows and columns");
    if (a.strides(1) != size || a.strides(0) % size)
        throw std::invalid_argument(std::string(what) + " must have contiguous rows");
    return {a.data(), source, a.strides(0) / size, static_cast<int>(a.shape(0)), static_cast<int>(a.shape(1))};
}
const float* vector_of(const std::optional<F32Array>& a, int64_t n, const char* what) {
    if (!a) return nullptr;
    if (a->ndim() != 1 || a->shape(0) != n)
        throw std::invalid_argument(std::string(what) + " must be float32 of shape (" + std::to_string(n) + ",)");
    return a->data();
}
void check_offsets(const I64Array& offsets, int64_t tokens) {
    if (offsets.ndim() != 1 || offsets.shape(0) < 1)
        throw std::invalid_argument("offsets must be int64 of shape (N + 1,)");
    const int64_t* o = offsets.data();
    for (py::ssize_t i = 0; i + 1 < offsets.shape(0); ++i)
        if (o[i] > o[i + 1]) throw std::invalid_argument("offsets must not decrease");
    if (o[0] != 0 || o[offsets.shape(0) - 1] != tokens)
        throw std::invalid_argument("offsets must start at 0 and end at the number of tokens");
}

}  // namespace fastrerank::python
