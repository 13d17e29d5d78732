// The interface to the encoder, whose weights are given one by one as NumPy arrays.
#include "encoder/encoder.h"

#include <memory>
#include <vector>

#include "python/module.h"

namespace fastrerank::python {

using namespace cpu;

namespace {

Readout readout_of(const std::string& name) {
    static const std::pair<const char*, Readout> table[] = {
        {"first", Readout::kFirst}, {"last", Readout::kLast}, {"mean", Readout::kMean}, {"tokens", Readout::kTokens}};
    return by_name(table, name, "readout");
}
const float* table_of(const std::optional<F32Array>& a, int rows, int columns, const char* what) {
    if (!a) return nullptr;
    if (a->ndim() != 2 || a->shape(0) != rows || a->shape(1) != columns)
        throw std::invalid_argument(std::string(what) + " must be float32 of shape (" + std::to_string(rows) + ", " +
                                    std::to_string(columns) + ")");
    return a->data();
}

class PyEncoder {
public:
    PyEncoder(const py::dict& d, const std::string& isa) : encoder_(config_of(d), kernels_of(isa)) {}

    void set_linear(int layer, const std::string& name, const py::array& w, const std::optional<F32Array>& bias) {
        const Weight m = weight_of(w, name.c_str());
        const float* b = vector_of(bias, m.n, "bias");
        without_gil([&] { encoder_.set_linear(layer, name, m.data, m.source, m.ld, m.n, m.k, b); });
    }
    void set_norm(int layer, const std::string& name, const F32Array& gamma, const std::optional<F32Array>& beta) {
        if (gamma.ndim() != 1) throw std::invalid_argument("gamma must be float32 of one dimension");
        const int n = static_cast<int>(gamma.size());
        encoder_.set_norm(layer, name, gamma.data(), vector_of(beta, n, "beta"), n);
    }
    void set_factor(int layer, const std::string& name, const F32Array& factor) {
        encoder_.set_factor(layer, name, factor.data(), static_cast<int>(factor.size()));
    }
    void set_strip(int layer, const I32Array& columns, const F32Array& weight) {
        const Weight m = weight_of(weight, "strip");
        if (columns.ndim() != 1 || columns.size() != m.k)
            throw std::invalid_argument("strip must hold one column of weights for each of its columns");
        encoder_.set_strip(layer, columns.data(), weight.data(), m.n, m.k);
    }
    void set_tables(const std::optional<py::array>& word, const std::optional<F32Array>& position,
                    const std::optional<F32Array>& type) {
        const EncoderConfig& c = encoder_.config();
        const float* positions = table_of(position, c.positions, c.embedding, "position embeddings");
        const float* types = table_of(type, c.types, c.embedding, "type embeddings");
        if (!word) return encoder_.set_tables(nullptr, Source::kF32, positions, types);
        const Weight m = weight_of(*word, "word embeddings");
        if (m.n != c.vocabulary || m.k != c.embedding || m.ld != m.k)
            throw std::invalid_argument("word embeddings must have shape (" + std::to_string(c.vocabulary) + ", " +
                                        std::to_string(c.embedding) + ")");
        encoder_.set_tables(m.data, m.source, positions, types);
        word_ = *word;
    }
    void set_word_rows(int fd, const std::string& path, int64_t offset, int64_t size, int64_t changed,
                       const std::string& dtype) {
        static const std::pair<const char*, Source> table[] = {
            {"F32", Source::kF32}, {"F16", Source::kF16}, {"BF16", Source::kBF16}};
        const Source source = by_name(table, dtype, "dtype");
        const EncoderConfig& c = encoder_.config();
        encoder_.set_word_rows(
            std::make_unique<RowTable>(fd, path, offset, c.vocabulary,
                                       c.embedding * int64_t{source == Source::kF32 ? 4 : 2}, size, changed),
            source);
    }
    void add_dense(const py::array& w, const std::optional<F32Array>& bias, const std::string& act) {
        const Weight m = weight_of(w, "head weight");
        if (m.k != encoder_.output_width())
            throw std::invalid_argument("head weight reads " + std::to_string(m.k) + " values, gets " +
                                        std::to_string(encoder_.output_width()));
        encoder_.add_dense(m.data, m.source, m.ld, m.n, m.k, vector_of(bias, m.n, "head bias"), activation_of(act));
    }
    void add_norm(const F32Array& gamma, const std::optional<F32Array>& beta, float eps) {
        if (gamma.ndim() != 1) throw std::invalid_argument("gamma must be float32 of one dimension");
        const int n = static_cast<int>(gamma.size());
        if (n != encoder_.output_width()) throw std::invalid_argument("head norm width differs from its input");
        encoder_.add_norm(gamma.data(), vector_of(beta, n, "beta"), n, eps);
    }

    F32Array forward(const I32Array& ids, const std::optional<I32Array>& types, const I64Array& offsets,
                     const std::string& readout, int threads) const {
        const int64_t tokens = ids.size();
        if (types && types->size() != tokens) throw std::invalid_argument("types must have as many entries as ids");
        check_offsets(offsets, tokens);
        const Readout r = readout_of(readout);
        threads = threads_of(threads);
        const int documents = static_cast<int>(offsets.size() - 1);
        F32Array out({r == Readout::kTokens ? tokens : static_cast<int64_t>(documents),
                      static_cast<int64_t>(encoder_.output_width())});
        const int32_t* t = types ? types->data() : nullptr;
        float* o = out.mutable_data();
        without_gil([&] { encoder_.forward(ids.data(), t, offsets.data(), documents, r, threads, o); });
        return out;
    }

    int output_width() const { return encoder_.output_width(); }
    size_t weight_bytes() const { return encoder_.weight_bytes(); }
    std::string isa() const { return encoder_.kernels().name; }
    void add_rope(float theta, int half) { encoder_.add_rope(theta, half); }
    void add_normalize() { encoder_.add_normalize(); }

private:
    static EncoderConfig config_of(const py::dict& d) {
        EncoderConfig c;
        const auto number = [&](const char* key) { return d[key].cast<int>(); };
        c.hidden = number("hidden"), c.layers = number("layers"), c.heads = number("heads");
        c.head_dim = number("head_dim"), c.intermediate = number("intermediate"), c.embedding = number("embedding");
        c.vocabulary = number("vocabulary"), c.positions = number("positions"), c.types = number("types");
        c.position_offset = number("position_offset"), c.pad_id = number("pad_id");
        c.pre_norm = d["pre_norm"].cast<bool>(), c.gated = d["gated"].cast<bool>();
        c.activation = activation_of(d["activation"].cast<std::string>());
        c.eps = d["eps"].cast<float>();
        c.window = d["window"].cast<std::vector<int>>(), c.rope = d["rope"].cast<std::vector<int>>();
        c.attention_scale = d["attention_scale"].cast<float>();
        c.precision = precision_of(d["precision"].cast<std::string>());
        c.precise_layers = number("precise_layers");
        return c;
    }

    Encoder encoder_;
    py::array word_;  // keeps the word table alive
};

const Part part([](py::module_& m) {
    py::class_<PyEncoder>(m, "Encoder")
        .def(py::init<const py::dict&, const std::string&>(), py::arg("config"), py::arg("isa"))
        .def("set_linear", &PyEncoder::set_linear, py::arg("layer"), py::arg("name"), py::arg("weight"),
             py::arg("bias").none(true))
        .def("set_norm", &PyEncoder::set_norm, py::arg("layer"), py::arg("name"), py::arg("gamma"),
             py::arg("beta").none(true))
        .def("set_factor", &PyEncoder::set_factor, py::arg("layer"), py::arg("name"), py::arg("factor"))
        .def("set_strip", &PyEncoder::set_strip, py::arg("layer"), py::arg("columns"), py::arg("weight"))
        .def("set_word_rows", &PyEncoder::set_word_rows, py::arg("fd"), py::arg("path"), py::arg("offset"),
             py::arg("size"), py::arg("changed"), py::arg("dtype"))
        .def("set_tables", &PyEncoder::set_tables, py::arg("word").none(true), py::arg("position").none(true),
             py::arg("type").none(true))
        .def("add_rope", &PyEncoder::add_rope, py::arg("theta"), py::arg("half"))
        .def("add_dense", &PyEncoder::add_dense, py::arg("weight"), py::arg("bias").none(true), py::arg("activation"))
        .def("add_norm", &PyEncoder::add_norm, py::arg("gamma"), py::arg("beta").none(true), py::arg("eps"))
        .def("add_normalize", &PyEncoder::add_normalize)
        .def("forward", &PyEncoder::forward, py::arg("ids"), py::arg("types").none(true), py::arg("offsets"),
             py::arg("readout"), py::arg("threads"))
        .def_property_readonly("output_width", &PyEncoder::output_width)
        .def_property_readonly("weight_bytes", &PyEncoder::weight_bytes)
        .def_property_readonly("isa", &PyEncoder::isa);
});

}  // namespace
}  // namespace fastrerank::python
