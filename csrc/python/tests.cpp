// The module `_cpu_tests`: kernels that no public op calls alone, for the tests. Wheels do not hold it.
#include <vector>

#include "cur_topk/reservoir.h"
#include "linear/packed_linear.h"
#include "python/module.h"

// This module runs the kernels that `_cpu` holds, so tests see the code that ships.
const fastrerank::cpu::Kernels* fastrerank::cpu::kernels(Isa isa) {
    static const auto of_cpu = reinterpret_cast<const Kernels* (*)(Isa)>(
        pybind11::module_::import("fastrerank._cpu").attr("kernels").cast<pybind11::capsule>().get_pointer<void>());
    return of_cpu(isa);
}

namespace fastrerank::python {

using namespace cpu;

namespace {

// Copies rows to whole vectors, with zeros in the padding.
Bytes padded_rows(const F32Array& x, const char* what) {
    if (x.ndim() != 2) throw std::invalid_argument(std::string(what) + " must be float32 of shape (rows, n)");
    const int64_t rows = x.shape(0), n = x.shape(1), width = padded(n);
    Bytes wide(rows * width * sizeof(float));
    std::fill_n(wide.as<float>(), rows * width, 0.0f);
    for (int64_t r = 0; r < rows; ++r)
        std::copy(x.data() + r * n, x.data() + (r + 1) * n, wide.as<float>() + r * width);
    return wide;
}
Bytes padded_vector(const float* v, int64_t n) {
    Bytes wide(padded(n) * sizeof(float));
    std::fill_n(wide.as<float>(), padded(n), 0.0f);
    std::copy(v, v + n, wide.as<float>());
    return wide;
}

// The first n columns of padded rows.
F32Array true_rows(const Bytes& wide, int rows, int n) {
    F32Array out({static_cast<int64_t>(rows), static_cast<int64_t>(n)});
    for (int r = 0; r < rows; ++r)
        std::copy_n(wide.as<float>() + r * padded(n), n, out.mutable_data() + static_cast<int64_t>(r) * n);
    return out;
}

// y = activation(x W^T + b), with x converted as the encoder converts it. "gelu_fast" is the GELU of products whose
// outputs are rounded to 8 or 16 bits.
class TestLinear {
public:
    TestLinear(const py::array& w, const std::optional<F32Array>& bias, const std::string& dtype,
               const std::string& isa)
        : TestLinear(weight_of(w, "w"), bias, dtype, kernels_of(isa)) {}

    F32Array call(const F32Array& x, const std::string& activation) const {
        const PackedMatrix& w = linear_.view();
        if (x.ndim() != 2 || x.shape(1) != w.k) throw std::invalid_argument("x must be float32 of shape (rows, k)");
        const bool fast = activation == "gelu_fast";
        const Activation act = fast ? Activation::kGelu : activation_of(activation);
        const int rows = static_cast<int>(x.shape(0));
        const int64_t inputs = padded(w.k), tiled = rows + kRowTile;
        const Format format = linear_.kernels().input_format(w.precision);
        const Bytes wide = padded_rows(x, "x"), input(tiled * inputs * bytes_of(format)),
                    scale(tiled * sizeof(RowScale)), y(tiled * w.n_padded * sizeof(float));
        linear_.kernels().convert(wide.as<float>(), inputs, rows, w.k,
                                  {.q = input.get(), .ldq = inputs, .scale = scale.as<RowScale>(), .format = format});
        linear_.kernels().linear({.w = &w,
                                  .x = input.get(),
                                  .x_scale = scale.as<RowScale>(),
                                  .ldx = inputs,
                                  .rows = rows,
                                  .act = act,
                                  .fast_act = fast,
                                  .y = y.get(),
                                  .ldy = w.n_padded,
                                  .terms = format == Format::kTerms});
        return true_rows(y, rows, w.n);
    }

private:
    TestLinear(const Weight& m, const std::optional<F32Array>& bias, const std::string& dtype, const Kernels& k)
        : linear_(k, precision_of(dtype), m.data, m.source, m.ld, m.n, m.k, vector_of(bias, m.n, "bias")) {}
    PackedLinear linear_;
};

F32Array linear(const F32Array& x, const py::array& w, const std::optional<F32Array>& bias, const std::string& dtype,
                const std::string& activation, const std::string& isa) {
    return TestLinear(w, bias, dtype, isa).call(x, activation);
}

F32Array layer_norm(const F32Array& x, const F32Array& gamma, const std::optional<F32Array>& beta, float eps,
                    const std::string& isa) {
    const Kernels& k = kernels_of(isa);
    const Bytes wide = padded_rows(x, "x");
    const int rows = static_cast<int>(x.shape(0)), n = static_cast<int>(x.shape(1));
    const int64_t width = padded(n);
    const Bytes g = padded_vector(vector_of(gamma, n, "gamma"), n);
    const float* given = vector_of(beta, n, "beta");
    const Bytes b = given ? padded_vector(given, n) : Bytes();
    k.layer_norm({.x = wide.as<float>(),
                  .ldx = width,
                  .rows = rows,
                  .n = n,
                  .gamma = g.as<float>(),
                  .beta = b.as<float>(),
                  .eps = eps,
                  .y = wide.as<float>(),
                  .ldy = width});
    return true_rows(wide, rows, n);
}

py::tuple quantise(const F32Array& x, const std::optional<F32Array>& factor, const std::string& isa) {
    const Kernels& k = kernels_of(isa);
    const Bytes wide = padded_rows(x, "x");
    const int rows = static_cast<int>(x.shape(0)), n = static_cast<int>(x.shape(1));
    const int64_t width = padded(n);
    const float* given = vector_of(factor, n, "factor");
    const Bytes f = given ? padded_vector(given, n) : Bytes();
    const Bytes q(rows * width), scales(rows * sizeof(RowScale));
    k.convert(
        wide.as<float>(), width, rows, n,
        {.q = q.get(), .ldq = width, .scale = scales.as<RowScale>(), .factor = f.as<float>(), .format = Format::kU8});
    py::array_t<uint8_t> out({static_cast<int64_t>(rows), static_cast<int64_t>(n)});
    F32Array scale(rows);
    I32Array zero(rows);
    for (int r = 0; r < rows; ++r) {
        std::copy_n(q.as<uint8_t>() + r * width, n, out.mutable_data() + static_cast<int64_t>(r) * n);
        scale.mutable_data()[r] = scales.as<RowScale>()[r].scale;
        zero.mutable_data()[r] = scales.as<RowScale>()[r].zero;
    }
    return py::make_tuple(out, scale, zero);
}

struct HostLanes {
    int lane = 0, count = 1;
    void barrier() const {}
    int add(int* n) const { return (*n)++; }
    bool any(bool x) const { return x; }
};

// Runs the selection of the CUDA kernels in one host thread: the k best of each block's batches of scores, and the k
// best of those.
std::pair<std::vector<int32_t>, std::vector<float>> reservoir_topk(const std::vector<float>& scores, int k, int batch,
                                                                   int blocks) {
    using namespace fastrerank::cuda;
    constexpr int64_t kMost = 1 << 20;
    if (k < 1 || batch < 1 || blocks < 1 || k > kMost || batch > kMost || int64_t{k} * blocks > 16 * kMost)
        throw std::invalid_argument("k, batch and blocks must be at least 1 and of a device's size");
    const int size = reservoir_size(k, batch);
    std::vector<Entry> best(static_cast<size_t>(blocks) * k, kNoEntry);
    const auto barrier = [] {};
    for (int block = 0; block < blocks; ++block) {
        std::vector<Entry> entries(size);
        Entry threshold = kNoEntry;
        int count = 0;
        for (size_t begin = static_cast<size_t>(block) * batch; begin < scores.size();
             begin += static_cast<size_t>(batch) * blocks) {
            for (size_t i = begin; i < std::min(begin + batch, scores.size()); ++i) {
                const Entry e = entry_of(scores[i], static_cast<int32_t>(i));
                if (e > threshold) entries[count++] = e;
            }
            if (count + batch <= size) continue;
            cut_back(entries.data(), size, count, 0, 1, barrier);
            threshold = count >= k ? entries[k - 1] : kNoEntry;
            count = std::min(count, k);
        }
        cut_back(entries.data(), size, count, 0, 1, barrier);
        std::copy_n(entries.begin(), k, best.begin() + static_cast<size_t>(block) * k);
    }
    std::vector<Entry> merged(reservoir_size(k, 1));
    Entry threshold = kNoEntry;
    int filled = 0;
    merge_lists(best.data(), blocks, k, merged.data(), static_cast<int>(merged.size()), &filled, &threshold,
                HostLanes());
    std::pair<std::vector<int32_t>, std::vector<float>> result;
    for (int i = 0; i < k && merged[i] != kNoEntry; ++i) {
        result.first.push_back(id_of(merged[i]));
        result.second.push_back(score_of(merged[i]));
    }
    return result;
}

}  // namespace
}  // namespace fastrerank::python

PYBIND11_MODULE(_cpu_tests, m) {
    using namespace fastrerank::python;
    m.doc() = "Kernels of fastrerank that only its tests call alone.";
    m.def("linear", &linear, py::arg("x"), py::arg("w"), py::arg("bias"), py::arg("dtype"), py::arg("activation"),
          py::arg("isa"));
    m.def("layer_norm", &layer_norm, py::arg("x"), py::arg("gamma"), py::arg("beta").none(true), py::arg("eps"),
          py::arg("isa"));
    m.def("quantise", &quantise, py::arg("x"), py::arg("factor").none(true), py::arg("isa"));
    m.def("reservoir_topk", &reservoir_topk, py::arg("scores"), py::arg("k"), py::arg("batch"), py::arg("blocks"));
    py::class_<TestLinear>(m, "Linear")
        .def(py::init<const py::array&, const std::optional<F32Array>&, const std::string&, const std::string&>(),
             py::arg("w"), py::arg("bias").none(true), py::arg("dtype"), py::arg("isa"))
        .def("__call__", &TestLinear::call, py::arg("x"), py::arg("activation") = "identity");
}
