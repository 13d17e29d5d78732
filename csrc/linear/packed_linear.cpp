#include "linear/packed_linear.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "runtime/parallel.h"

namespace fastrerank::cpu {

bool OwnedMatrix::pack(const Kernels& kernels, std::shared_ptr<char> memory, Precision precision, const void* w,
                       Source source, int64_t ldw, int n, int k, const float* given) {
    const int64_t columns = padded(n);
    bytes = kernels.packed_bytes(precision, n, k);
    data = std::move(memory);
    for (Bytes* vector : {&scale, &sum, &bias}) *vector = Bytes(columns * sizeof(float));
    std::fill_n(bias.as<float>(), columns, 0.0f);
    if (given) std::copy_n(given, n, bias.as<float>());
    view = {.precision = precision,
            .n = n,
            .k = k,
            .n_padded = static_cast<int>(columns),
            .k_padded = (k + 3) / 4 * 4,
            .data = data.get(),
            .scale = scale.as<float>(),
            .sum = sum.as<float>(),
            .bias = bias.as<float>()};
    return kernels.pack(precision, w, source, ldw, n, k, data.get(), scale.as<float>(), sum.as<float>());
}

PackedLinear::PackedLinear(const Kernels& kernels, Precision precision, const void* w, Source source, int64_t ldw,
                           int n, int k, const float* bias)
    : k_(kernels) {
    const auto memory = std::make_shared<Bytes>(kernels.packed_bytes(precision, n, k));
    if (!matrix_.pack(kernels, {memory, memory->get()}, precision, w, source, ldw, n, k, bias))
        throw std::invalid_argument("w has a value that is NaN or infinite");
}

Format PackedLinear::stored() const {
    const Format format = k_.input_format(view().precision);
    return format == Format::kTerms ? Format::kF32 : format;
}

void PackedLinear::run(const char* x, int64_t ldx, int64_t rows, char* y, int64_t ldy, int threads) const {
    const PackedMatrix& w = view();
    if (w.precision == Precision::kInt8) throw std::invalid_argument("run takes float32 or bfloat16 products");
    const Format format = stored();
    const bool terms = format != k_.input_format(w.precision);
    const int64_t element = static_cast<int64_t>(bytes_of(format));
    const int64_t tiles = terms ? 32 : 24;  // a multiple of every level's row tile
    const bool in_place = !terms && w.k == w.k_padded && w.n == w.n_padded;
    const int64_t share = (rows + threads - 1) / threads;
    // Each block splits the weights into terms again.
    const int64_t block = std::clamp((share + tiles - 1) / tiles * tiles, tiles, (terms ? 16 : 4) * tiles);
    const auto product = [&](const char* a, int64_t lda, int64_t count, char* b, int64_t ldb) {
        k_.linear({.w = &w,
                   .x = a,
                   .ldx = lda,
                   .rows = static_cast<int>(count),
                   .y = b,
                   .ldy = ldb,
                   .y_format = format,
                   .terms = terms});
    };
    run_parallel(static_cast<int>((rows + block - 1) / block), threads, [&](int i) {
        int64_t begin = i * block;
        const int64_t end = std::min(begin + block, rows);
        // Rows are multiplied in place where whole tiles and vectors fit, the rest through a copy.
        const int64_t whole = in_place ? (end - begin) / tiles * tiles : 0;
        if (whole) product(x + begin * ldx * element, ldx, whole, y + begin * ldy * element, ldy);
        begin += whole;
        const int64_t rest = end - begin;
        if (!rest) return;
        const int64_t ldb = w.n_padded;
        const Bytes a = inputs_of(x + begin * ldx * element, ldx, rest), b((rest + kRowTile) * ldb * element);
        product(a.get(), padded(w.k), rest, b.get(), ldb);
        for (int64_t r = 0; r < rest; ++r)
            std::copy_n(b.get() + r * ldb * element, w.n * element, y + (begin + r) * ldy * element);
    });
}

Bytes PackedLinear::inputs_of(const char* from, int64_t ldx, int64_t rows) const {
    const int k = view().k;
    const Format inputs = k_.input_format(view().precision);
    const int64_t element = static_cast<int64_t>(bytes_of(stored())), taken = k * element, width = padded(k);
    const int64_t row = width * static_cast<int64_t>(bytes_of(inputs));
    Bytes a((rows + kRowTile) * row), wide(width * element);
    std::fill_n(a.get(), (rows + kRowTile) * row, '\0');
    std::fill_n(wide.get(), width * element, '\0');
    for (int64_t r = 0; r < rows; ++r) {
        const char* x = from + r * ldx * element;
        char* to = a.get() + r * row;
        if (inputs == Format::kTerms) {
            std::copy_n(x, taken, wide.get());
            k_.convert(wide.as<float>(), width, 1, k, {.q = to, .ldq = width, .format = inputs});
        } else {
            std::copy_n(x, taken, to);
        }
    }
    return a;
}

void run_feed_forward(const PackedLinear& gate, const PackedLinear& down, const PackedLinear* up, Activation act,
                      const char* x, int64_t ldx, int64_t rows, char* y, int64_t ldy, int threads) {
    const PackedMatrix &first = gate.view(), &out = down.view();
    if (first.precision == Precision::kInt8 || (up && up->view().precision != first.precision) ||
        out.precision != first.precision)
        throw std::invalid_argument("run_feed_forward takes float32 products or bfloat16 products");
    if ((up && (up->view().k != first.k || up->view().n != first.n)) || out.k != first.n)
        throw std::invalid_argument("run_feed_forward takes products of one shape, and `down` of their outputs");
    const Kernels& k = gate.kernels();
    const Format format = gate.stored(), inputs = k.input_format(first.precision);
    const bool terms = format != inputs;
    const int64_t element = static_cast<int64_t>(bytes_of(format));
    // Each block reads all weights once. Blocks whose intermediate rows fit in a core's cache are slower where the
    // weights do not: at 896 x 4864, 203 GFLOP/s with 24 rows, 266 with 144, on 2 MiB of cache. On tiles
    // (AMX) 1,830 with 64 rows, 2,020 with 128, 1,800 with 192.
    const int64_t tile = k.tiles ? 32 : 24, most = k.tiles ? 4 * tile : 6 * tile;
    const int64_t width = first.n_padded, lda = padded(first.k), ldb = out.n_padded;
    const int64_t share = ((rows + threads - 1) / threads + tile - 1) / tile * tile;
    const int64_t block = std::clamp<int64_t>(share, tile, most);
    run_parallel(static_cast<int>((rows + block - 1) / block), threads, [&](int i) {
        const int64_t begin = i * block, count = std::min(begin + block, rows) - begin, tiled = count + kRowTile;
        const Bytes rows_in = gate.inputs_of(x + begin * ldx * element, ldx, count);
        const Bytes wide(up ? tiled * width * 4 : 0), inner(tiled * width * bytes_of(inputs)),
            result(tiled * ldb * element);
        Linear product{.x = rows_in.get(), .ldx = lda, .rows = static_cast<int>(count), .ldy = width, .terms = terms};
        if (up) {
            product.w = &up->view();
            product.y = wide.get();
            k.linear(product);
            product.mul = wide.as<float>();
        }
        product.w = &first;
        product.act = act;
        product.y = inner.get();
        product.y_format = inputs;
        k.linear(product);
        k.linear({.w = &out,
                  .x = inner.get(),
                  .ldx = width,
                  .rows = product.rows,
                  .y = result.get(),
                  .ldy = ldb,
                  .y_format = format,
                  .terms = terms});
        for (int64_t r = 0; r < count; ++r)
            std::copy_n(result.get() + r * ldb * element, out.n * element, y + (begin + r) * ldy * element);
    });
}

}  // namespace fastrerank::cpu
