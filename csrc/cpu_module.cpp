// The pybind11 interface to the CPU kernels: checks buffers, releases the GIL, calls. No arithmetic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/encoder.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu_module.h"
#include "without_gil.h"

namespace py = pybind11;
using namespace fastrerank::cpu;

namespace {

Activation activation_of(const std::string& name) {
    static const std::pair<const char*, Activation> table[] = {
        {"identity", Activation::kIdentity}, {"gelu", Activation::kGelu}, {"gelu_tanh", Activation::kGeluTanh},
        {"relu", Activation::kRelu},         {"tanh", Activation::kTanh}, {"silu", Activation::kSilu},
        {"sigmoid", Activation::kSigmoid}};
    return by_name(table, name, "activation");
}
Readout readout_of(const std::string& name) {
    static const std::pair<const char*, Readout> table[] = {
        {"first", Readout::kFirst}, {"last", Readout::kLast}, {"mean", Readout::kMean}, {"tokens", Readout::kTokens}};
    return by_name(table, name, "readout");
}
using F32Array = py::array_t<float, py::array::c_style>;
using I32Array = py::array_t<int32_t, py::array::c_style>;
using I64Array = py::array_t<int64_t, py::array::c_style>;

// A float32, float16 or (as uint16) bfloat16 matrix whose rows are contiguous.
struct Weight {
    const void* data;
    Source source;
    int64_t ld;
    int n, k;
};
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
    if (a.dtype().byteorder() == '>')  // of every array in the machine's order NumPy says '='
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
const float* table_of(const std::optional<F32Array>& a, int rows, int columns, const char* what) {
    if (!a) return nullptr;
    if (a->ndim() != 2 || a->shape(0) != rows || a->shape(1) != columns)
        throw std::invalid_argument(std::string(what) + " must be float32 of shape (" + std::to_string(rows) + ", " +
                                    std::to_string(columns) + ")");
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

F32Array max_sim(const F32Array& query, const F32Array& tokens, const I64Array& offsets, int threads,
                 const std::string& isa) {
    if (query.ndim() != 2 || tokens.ndim() != 2 || query.shape(1) != tokens.shape(1))
        throw std::invalid_argument("query and tokens must be float32 matrices of the same width");
    if (query.shape(0) < 1) throw std::invalid_argument("query must have at least one token");
    check_offsets(offsets, tokens.shape(0));
    const Kernels& k = *kernels_of(isa);
    threads = threads_of(threads);
    const int lq = static_cast<int>(query.shape(0)), dim = static_cast<int>(query.shape(1));
    const int documents = static_cast<int>(offsets.size() - 1);
    F32Array out(documents);
    float* o = out.mutable_data();
    without_gil([&] {
        Bytes packed(k.packed_bytes(Precision::kFloat32, lq, dim));
        if (!k.pack(Precision::kFloat32, query.data(), Source::kF32, dim, lq, dim, packed.get(), nullptr, nullptr))
            throw std::invalid_argument("query has a value that is NaN or infinite");
        // A document's value depends on its own rows only, so any split gives the same result.
        constexpr int kPerTask = 16;
        run_parallel((documents + kPerTask - 1) / kPerTask, threads, [&](int i) {
            Bytes best(padded(lq) * sizeof(float));
            const int begin = i * kPerTask, count = std::min(kPerTask, documents - begin);
            k.max_sim(packed.get(), lq, dim, tokens.data(), dim, offsets.data() + begin, count, best.as<float>(),
                      o + begin);
        });
    });
    return out;
}

// run_parallel without the GIL, on the workers that torch uses.
void on_openmp(int n, int threads, const std::function<void(int)>& f) {
    without_gil([&] {
        const OnOpenMp workers;
        run_parallel(n, threads, f);
    });
}

// y = activation(x W^T + b) through one level's packed product, with x converted as the encoder converts it.
class PyLinear {
public:
    PyLinear(const py::array& w, const std::optional<F32Array>& bias, const std::string& dtype, const std::string& isa)
        : k_(*kernels_of(isa)) {
        const Weight m = weight_of(w, "w");
        const Precision precision = precision_of(dtype);
        const int64_t columns = padded(m.n);
        data_ = Bytes(k_.packed_bytes(precision, m.n, m.k));
        scale_ = Bytes(columns * sizeof(float));
        sum_ = Bytes(columns * sizeof(float));
        bias_ = Bytes(columns * sizeof(float));
        std::fill_n(bias_.as<float>(), columns, 0.0f);
        const float* given = vector_of(bias, m.n, "bias");
        if (given) std::copy(given, given + m.n, bias_.as<float>());
        if (!k_.pack(precision, m.data, m.source, m.ld, m.n, m.k, data_.get(), scale_.as<float>(), sum_.as<float>()))
            throw std::invalid_argument("w has a value that is NaN or infinite");
        packed_ = {precision,
                   m.n,
                   m.k,
                   static_cast<int>(columns),
                   (m.k + 3) / 4 * 4,
                   data_.get(),
                   scale_.as<float>(),
                   sum_.as<float>(),
                   bias_.as<float>()};
    }

    F32Array call(const F32Array& x, const std::string& activation) const {
        if (x.ndim() != 2 || x.shape(1) != packed_.k)
            throw std::invalid_argument("x must be float32 of shape (rows, k)");
        const bool fast = activation == "gelu_fast";  // what products do whose outputs are rounded to 8 or 16 bits
        const Activation act = fast ? Activation::kGelu : activation_of(activation);
        const int rows = static_cast<int>(x.shape(0));
        const int64_t columns = packed_.n_padded, inputs = padded(packed_.k), tiled = rows + kRowTile;
        const Format format = k_.input_format(packed_.precision);
        Bytes wide(tiled * inputs * sizeof(float)), input(tiled * inputs * bytes_of(format)),
            x_scale(tiled * sizeof(RowScale)), y(tiled * columns * sizeof(float));
        std::fill_n(wide.as<float>(), tiled * inputs, 0.0f);
        for (int r = 0; r < rows; ++r)
            std::copy(x.data() + r * packed_.k, x.data() + (r + 1) * packed_.k, wide.as<float>() + r * inputs);
        k_.convert(wide.as<float>(), inputs, rows, packed_.k,
                   {input.get(), inputs, x_scale.as<RowScale>(), nullptr, format});
        k_.linear({&packed_, input.get(), x_scale.as<RowScale>(), inputs, rows, act, fast, nullptr, nullptr, y.get(),
                   columns, Format::kF32, format == Format::kTerms});
        F32Array out({static_cast<int64_t>(rows), static_cast<int64_t>(packed_.n)});
        for (int r = 0; r < rows; ++r)
            std::copy(y.as<float>() + r * columns, y.as<float>() + r * columns + packed_.n,
                      out.mutable_data() + r * packed_.n);
        return out;
    }

    // The same on the caller's memory, x (rows, k) and y (rows, n) in the format that the product reads: rows go to it
    // in place where whole tiles and vectors fit, else through a copy.
    void run(uintptr_t x, int64_t ldx, int64_t rows, uintptr_t y, int64_t ldy, int threads) const {
        if (packed_.precision == Precision::kInt8)
            throw std::invalid_argument("run takes float32 or bfloat16 products");
        threads = threads_of(threads);
        const Format format = stored();
        const bool terms = format != k_.input_format(packed_.precision);
        const int64_t element = static_cast<int64_t>(bytes_of(format));
        const char* from = reinterpret_cast<const char*>(x);
        char* to = reinterpret_cast<char*>(y);
        const int64_t tiles = terms ? 32 : 24;  // a multiple of every level's row tile
        const bool in_place = !terms && packed_.k == packed_.k_padded && packed_.n == packed_.n_padded;
        const int64_t share = (rows + threads - 1) / threads;
        // Terms of weights are made anew for each block.
        const int64_t block = std::clamp((share + tiles - 1) / tiles * tiles, tiles, (terms ? 16 : 4) * tiles);
        const auto product = [&](const char* a, int64_t lda, int64_t count, char* b, int64_t ldb) {
            k_.linear({&packed_, a, nullptr, lda, static_cast<int>(count), Activation::kIdentity, false, nullptr,
                       nullptr, b, ldb, format, terms});
        };
        on_openmp(static_cast<int>((rows + block - 1) / block), threads, [&](int i) {
            int64_t begin = i * block;
            const int64_t end = std::min(begin + block, rows);
            const int64_t whole = in_place ? (end - begin) / tiles * tiles : 0;
            if (whole) product(from + begin * ldx * element, ldx, whole, to + begin * ldy * element, ldy);
            begin += whole;
            const int64_t rest = end - begin;
            if (!rest) return;
            const int64_t ldb = packed_.n_padded;
            const Bytes a = inputs_of(from + begin * ldx * element, ldx, rest), b((rest + kRowTile) * ldb * element);
            product(a.get(), padded(packed_.k), rest, b.get(), ldb);
            for (int64_t r = 0; r < rest; ++r)
                std::copy_n(b.get() + r * ldb * element, packed_.n * element, to + (begin + r) * ldy * element);
        });
    }
    // y = down(act(x W^T)), or down(act(x W^T) * up(x)) where there is an `up`: a block of rows goes through all the
    // products, and its intermediate rows are never rounded before they are multiplied.
    void run_feed_forward(const PyLinear& down, const PyLinear* up, const std::string& activation, uintptr_t x,
                          int64_t ldx, int64_t rows, uintptr_t y, int64_t ldy, int threads) const {
        const PackedMatrix &gate = packed_, &out = down.packed_;
        if (gate.precision == Precision::kInt8 || (up && up->packed_.precision != gate.precision) ||
            out.precision != gate.precision)
            throw std::invalid_argument("run_feed_forward takes float32 products or bfloat16 products");
        if ((up && (up->packed_.k != gate.k || up->packed_.n != gate.n)) || out.k != gate.n)
            throw std::invalid_argument("run_feed_forward takes products of one shape, and `down` of their outputs");
        threads = threads_of(threads);
        const Activation act = activation_of(activation);
        const Format format = stored(), inputs = k_.input_format(gate.precision);
        const bool terms = format != inputs;
        const int64_t element = static_cast<int64_t>(bytes_of(format));
        const char* from = reinterpret_cast<const char*>(x);
        char* to = reinterpret_cast<char*>(y);
        // All weights pass by once per block. Blocks whose intermediate rows fit in a core's cache are slower where the
        // weights do not: at 896 x 4864, 203 GFLOP/s with 24 rows, 266 with 144, on 2 MiB of cache. On tiles
        // (AMX) 1,830 with 64 rows, 2,020 with 128, 1,800 with 192.
        const int64_t tile = k_.tiles ? 32 : 24, most = k_.tiles ? 4 * tile : 6 * tile;
        const int64_t width = gate.n_padded, lda = padded(gate.k), ldb = out.n_padded;
        const int64_t share = ((rows + threads - 1) / threads + tile - 1) / tile * tile;
        const int64_t block = std::clamp<int64_t>(share, tile, most);
        on_openmp(static_cast<int>((rows + block - 1) / block), threads, [&](int i) {
            const int64_t begin = i * block, count = std::min(begin + block, rows) - begin, tiled = count + kRowTile;
            const Bytes rows_in = inputs_of(from + begin * ldx * element, ldx, count);
            Bytes wide(up ? tiled * width * 4 : 0), inner(tiled * width * bytes_of(inputs)),
                result(tiled * ldb * element);
            const int n = static_cast<int>(count);
            float* mul = up ? wide.as<float>() : nullptr;
            if (up)
                k_.linear({&up->packed_, rows_in.get(), nullptr, lda, n, Activation::kIdentity, false, nullptr, nullptr,
                           mul, width, Format::kF32, terms});
            k_.linear(
                {&gate, rows_in.get(), nullptr, lda, n, act, false, mul, nullptr, inner.get(), width, inputs, terms});
            k_.linear({&out, inner.get(), nullptr, width, n, Activation::kIdentity, false, nullptr, nullptr,
                       result.get(), ldb, format, terms});
            for (int64_t r = 0; r < count; ++r)
                std::copy_n(result.get() + r * ldb * element, out.n * element, to + (begin + r) * ldy * element);
        });
    }
    // Bytes of a value that run reads and writes.
    int element() const { return static_cast<int>(bytes_of(stored())); }

private:
    // How the rows lie that run reads and writes.
    Format stored() const {
        const Format format = k_.input_format(packed_.precision);
        return format == Format::kTerms ? Format::kF32 : format;
    }
    // A copy of such rows as the product reads them, of stride padded(k), with zeros in the padding and a row tile
    // more.
    Bytes inputs_of(const char* from, int64_t ldx, int64_t rows) const {
        const Format inputs = k_.input_format(packed_.precision);
        const int64_t element = this->element(), taken = packed_.k * element, width = padded(packed_.k);
        const int64_t row = width * static_cast<int64_t>(bytes_of(inputs));
        Bytes a((rows + kRowTile) * row), wide(width * element);
        std::fill_n(a.get(), (rows + kRowTile) * row, '\0');
        std::fill_n(wide.get(), width * element, '\0');
        for (int64_t r = 0; r < rows; ++r) {
            const char* x = from + r * ldx * element;
            char* to = a.get() + r * row;
            if (inputs == Format::kTerms) {
                std::copy_n(x, taken, wide.get());
                k_.convert(wide.as<float>(), width, 1, packed_.k, {to, width, nullptr, nullptr, inputs});
            } else {
                std::copy_n(x, taken, to);
            }
        }
        return a;
    }

    const Kernels& k_;
    Bytes data_, scale_, sum_, bias_;
    PackedMatrix packed_;
};

F32Array linear(const F32Array& x, const py::array& w, const std::optional<F32Array>& bias, const std::string& dtype,
                const std::string& activation, const std::string& isa) {
    return PyLinear(w, bias, dtype, isa).call(x, activation);
}

// Rows of x with room for whole vectors, zeros in the padding.
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

F32Array layer_norm(const F32Array& x, const F32Array& gamma, const std::optional<F32Array>& beta, float eps,
                    const std::string& isa) {
    const Kernels& k = *kernels_of(isa);
    const Bytes wide = padded_rows(x, "x");
    const int rows = static_cast<int>(x.shape(0)), n = static_cast<int>(x.shape(1));
    const int64_t width = padded(n);
    const Bytes g = padded_vector(vector_of(gamma, n, "gamma"), n);
    const float* given = vector_of(beta, n, "beta");
    const Bytes b = given ? padded_vector(given, n) : Bytes();
    k.layer_norm({wide.as<float>(), width, rows, n, g.as<float>(), b.as<float>(), eps, wide.as<float>(), width, {}});
    F32Array out({static_cast<int64_t>(rows), static_cast<int64_t>(n)});
    for (int r = 0; r < rows; ++r)
        std::copy_n(wide.as<float>() + r * width, n, out.mutable_data() + static_cast<int64_t>(r) * n);
    return out;
}

py::tuple quantise(const F32Array& x, const std::optional<F32Array>& factor, const std::string& isa) {
    const Kernels& k = *kernels_of(isa);
    const Bytes wide = padded_rows(x, "x");
    const int rows = static_cast<int>(x.shape(0)), n = static_cast<int>(x.shape(1));
    const int64_t width = padded(n);
    const float* given = vector_of(factor, n, "factor");
    const Bytes f = given ? padded_vector(given, n) : Bytes();
    const Bytes q(rows * width), scales(rows * sizeof(RowScale));
    k.convert(wide.as<float>(), width, rows, n, {q.get(), width, scales.as<RowScale>(), f.as<float>(), Format::kU8});
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

double peak(const std::string& dtype, int threads, const std::string& isa) {
    const Kernels& k = *kernels_of(isa);
    const Precision p = precision_of(dtype);
    threads = threads_of(threads);
    double best = 0;
    without_gil([&] {
        for (int round = 0; round < 25; ++round) {
            std::vector<double> operations(threads);
            const auto begin = std::chrono::steady_clock::now();
            run_parallel(threads, threads, [&](int i) { operations[i] = k.peak(p, 2000000); });
            const std::chrono::duration<double> s = std::chrono::steady_clock::now() - begin;
            double total = 0;
            for (const double o : operations) total += o;
            best = std::max(best, total / s.count());
        }
    });
    return best;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "fastrerank's CPU kernels; use them through fastrerank.ops and fastrerank.engine.";
    m.def(
        "levels",
        [] {
            std::vector<std::string> names;
            for (int i = 0; i < kLevels; ++i)
                if (const Kernels* k = kernels(static_cast<Isa>(i))) names.emplace_back(k->name);
            return names;
        },
        "Instruction-set levels that this CPU runs, lowest first.");
    add_tensor_ops(m);
    add_cur_ops(m);
    m.def("max_sim", &max_sim, py::arg("query"), py::arg("tokens"), py::arg("offsets"), py::arg("threads"),
          py::arg("isa"));
    m.def("linear", &linear, py::arg("x"), py::arg("w"), py::arg("bias"), py::arg("dtype"), py::arg("activation"),
          py::arg("isa"));
    m.def("layer_norm", &layer_norm, py::arg("x"), py::arg("gamma"), py::arg("beta").none(true), py::arg("eps"),
          py::arg("isa"));
    m.def("quantise", &quantise, py::arg("x"), py::arg("factor").none(true), py::arg("isa"));
    m.def("peak", &peak, py::arg("dtype"), py::arg("threads"), py::arg("isa"));
    py::class_<PyLinear>(m, "Linear")
        .def(py::init<const py::array&, const std::optional<F32Array>&, const std::string&, const std::string&>(),
             py::arg("w"), py::arg("bias").none(true), py::arg("dtype"), py::arg("isa"))
        .def("__call__", &PyLinear::call, py::arg("x"), py::arg("activation") = "identity")
        .def("run_feed_forward", &PyLinear::run_feed_forward, py::arg("down"), py::arg("up").none(true),
             py::arg("activation"), py::arg("x"), py::arg("ldx"), py::arg("rows"), py::arg("y"), py::arg("ldy"),
             py::arg("threads"))
        .def("run", &PyLinear::run, py::arg("x"), py::arg("ldx"), py::arg("rows"), py::arg("y"), py::arg("ldy"),
             py::arg("threads"))
        .def_property_readonly("element", &PyLinear::element);
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
}
