#include "encoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "parallel.h"

namespace fastrerank::cpu {
namespace {

// Tokens per chunk: enough rows to reuse a streamed weight panel, few enough that a chunk's activations stay in L2.
constexpr int64_t kChunkTokens = 160;
// Rows that go through output projection, norms and feed-forward together: bounds the widest buffers. A multiple of
// every level's row tile (8, 6, 4), because a product that works in place must not touch the next block's rows.
constexpr int kBlockRows = 72;

[[noreturn]] void invalid(const std::string& message) { throw std::invalid_argument(message); }

}  // namespace

// Buffers of one chunk in flight. Zeroed when made: padding columns stay finite whatever was there before.
struct Encoder::Workspace {
    Bytes x, input, input_scale, k, v, q, context, context_f32, wide, gate, wide_input, context_scale, scratch, head0,
        head1, ids, positions, types, down_scale, v_input, v_scale, strip_input, other_input;

    // Room for `rows` rows of `columns` values, and for the tile that a product rounds them up to.
    template <class T = char>
    static T* need(Bytes& b, int64_t rows, int64_t columns = 1) {
        const size_t bytes = static_cast<size_t>(rows + kRowTile) * columns * sizeof(T);
        if (b.size() < bytes) {
            b = Bytes();  // release before asking for more
            b = Bytes(bytes);
            std::memset(b.get(), 0, bytes + 64);
        }
        return b.as<T>();
    }
};

// Rows `rows` of the state, and whose they are: document i has `queries[i]` consecutive rows from `row[i]`, the first
// standing at position `start[i]`; its keys are rows [key_row[i], key_row[i] + keys[i]) of k and v.
struct Encoder::Chunk {
    std::vector<int> document, key_row, keys, row, queries, start;
    std::vector<int64_t> token;  // where the document's tokens start in the request
    int tokens = 0;              // rows of k and v
    int rows = 0;                // rows of x
    Workspace* w = nullptr;
    float* x = nullptr;          // (rows, padded(hidden)) residual stream
    char* input = nullptr;       // (rows, padded(hidden)) what the products read; x itself for float32 post-norm
    RowScale* input_scale = nullptr;
    char* v_input = nullptr;     // (rows, padded(hidden)) what v reads: `input`, unless its columns have factors
    RowScale* v_scale = nullptr;
    int32_t *ids = nullptr, *positions = nullptr, *types = nullptr;
};

Encoder::Encoder(const EncoderConfig& config, const Kernels* kernels)
    : config_(config), k_(*kernels), layers_(config.layers) {
    if (config.head_dim % 16) invalid("head_dim must be padded to a multiple of 16");
    for (int i = 0; i < config.layers; ++i) {
        Layer& l = layers_[i];
        const bool precise = config.precision == Precision::kInt8 && i >= config.layers - config.precise_layers;
        l.precision = precise ? Precision::kBFloat16 : config.precision;
        l.input = k_.input_format(l.precision);
        l.attention = k_.attention_format[static_cast<int>(l.precision)];
    }
}

Encoder::~Encoder() = default;

void Encoder::check(const int32_t* ids, const int32_t* types, const int64_t* offsets, int documents) const {
    if (offsets[0] != 0) invalid("offsets must start at 0");
    for (int d = 0; d < documents; ++d) {
        const int64_t length = offsets[d + 1] - offsets[d];
        if (length < 1) invalid("document " + std::to_string(d) + " has no tokens");
        if (length + config_.position_offset > config_.positions)
            invalid("document " + std::to_string(d) + " has " + std::to_string(length) + " tokens, the model takes " +
                    std::to_string(config_.positions - config_.position_offset));
    }
    for (int64_t t = 0; t < offsets[documents]; ++t) {
        if (ids[t] < 0 || ids[t] >= config_.vocabulary)
            invalid("token id " + std::to_string(ids[t]) + " is outside the vocabulary of " +
                    std::to_string(config_.vocabulary));
        if (types && !type_.empty() && (types[t] < 0 || types[t] >= config_.types))
            invalid("token type " + std::to_string(types[t]) + " is outside the model's " +
                    std::to_string(config_.types));
    }
}

std::unique_ptr<Encoder::Workspace> Encoder::take_workspace() const {
    std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.empty()) return std::make_unique<Workspace>();
    auto w = std::move(idle_.back());
    idle_.pop_back();
    return w;
}

void Encoder::forward(const int32_t* ids, const int32_t* types, const int64_t* offsets, int documents, Readout readout,
                      int threads, float* out) const {
    if (documents == 0) return;
    check(ids, types, offsets, documents);
    // Longest first into the least filled of a multiple of `threads` bins, so that threads end together.
    std::vector<int> order(documents);
    std::iota(order.begin(), order.end(), 0);
    const auto length = [&](int d) { return offsets[d + 1] - offsets[d]; };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return length(a) > length(b); });
    const int64_t per_wave = kChunkTokens * threads;
    const int64_t bins = std::min<int64_t>(documents, (offsets[documents] + per_wave - 1) / per_wave * threads);
    std::vector<Chunk> chunks(bins);
    std::vector<std::pair<int64_t, int>> heap;  // (tokens, bin), smallest first
    for (int b = 0; b < bins; ++b) heap.emplace_back(0, b);
    for (const int d : order) {
        std::pop_heap(heap.begin(), heap.end(), std::greater<>());
        auto& [tokens, bin] = heap.back();
        Chunk& c = chunks[bin];
        c.document.push_back(d);
        c.token.push_back(offsets[d]);
        c.key_row.push_back(c.tokens);
        c.keys.push_back(static_cast<int>(length(d)));
        c.tokens += static_cast<int>(length(d));
        tokens += length(d);
        std::push_heap(heap.begin(), heap.end(), std::greater<>());
    }
    std::stable_sort(chunks.begin(), chunks.end(), [](const Chunk& a, const Chunk& b) { return a.tokens > b.tokens; });

    run_parallel(static_cast<int>(bins), threads, [&](int i) {
        Chunk& c = chunks[i];
        std::unique_ptr<Workspace> w = take_workspace();
        c.w = w.get();
        c.ids = Workspace::need<int32_t>(w->ids, c.tokens);
        c.positions = Workspace::need<int32_t>(w->positions, c.tokens);
        c.types = Workspace::need<int32_t>(w->types, c.tokens);
        for (size_t d = 0; d < c.document.size(); ++d) {
            int next = config_.position_offset;
            for (int t = 0; t < c.keys[d]; ++t) {
                const int row = c.key_row[d] + t;
                c.ids[row] = ids[c.token[d] + t];
                c.positions[row] = c.ids[row] == config_.pad_id ? config_.pad_id : next++;
                c.types[row] = types && !type_.empty() ? types[c.token[d] + t] : 0;
            }
        }
        run_chunk(c, readout, out);
        std::lock_guard<std::mutex> lock(mutex_);
        if (idle_.size() < static_cast<size_t>(threads)) idle_.push_back(std::move(w));
    });
}

void Encoder::embed(Chunk& c) const {
    const EncoderConfig& g = config_;
    const int64_t width = padded(g.hidden), ld = padded(g.embedding);
    c.x = Workspace::need<float>(c.w->x, c.tokens, width);
    float* target = projection_.data.size() ? Workspace::need<float>(c.w->context_f32, c.tokens, ld) : c.x;
    k_.embed({c.ids, c.positions, c.types, word_, word_source_, position_.empty() ? nullptr : position_.data(),
              type_.empty() ? nullptr : type_.data(), c.tokens, g.embedding, target, ld});
    const float* beta = embedding_norm_.has_beta ? embedding_norm_.beta.data() : nullptr;
    k_.layer_norm({target, ld, c.tokens, g.embedding, embedding_norm_.gamma.data(), beta, g.eps, target, ld, {}});
    if (projection_.data.size())
        k_.linear({&projection_.view, target, nullptr, ld, c.tokens, Activation::kIdentity, false, nullptr, nullptr,
                   c.x, width, Format::kF32});
}

// Norm of rows [begin, begin + rows) of x, written to x itself (`keep`) and to `input` for the products of `reader`:
// those of its attention, with a second copy for the values where their columns have factors, or its feed-forward's.
void Encoder::norm(Chunk& c, const Norm& norm, int begin, int rows, bool keep, const Layer& reader, bool attention,
                   char* input) const {
    const int64_t width = padded(config_.hidden);
    float* x = c.x + begin * width;
    const int64_t at = begin * width * static_cast<int64_t>(bytes_of(reader.input));
    const bool factors = reader.input == Format::kU8;
    Stored first{input + at, width, c.input_scale + begin, nullptr, reader.input}, values{};
    if (input == reinterpret_cast<char*>(c.x)) first.q = nullptr;
    if (factors && !attention && !reader.up_factor.empty()) first.factor = reader.up_factor.data();
    if (factors && attention && !reader.v_factor.empty())
        values = {c.v_input + at, width, c.v_scale + begin, reader.v_factor.data(), reader.input};
    if (norm.gamma.empty()) {
        for (const Stored& s : {first, values})
            if (s.q) k_.convert(x, width, rows, config_.hidden, s);
        return;
    }
    float* y = keep ? x : Workspace::need<float>(c.w->head0, 1, width);
    k_.layer_norm({x,
                   width,
                   rows,
                   config_.hidden,
                   norm.gamma.data(),
                   norm.has_beta ? norm.beta.data() : nullptr,
                   config_.eps,
                   y,
                   keep ? width : 0,
                   {first, values}});
}

// Queries, keys or values in the attention's format; with a rotary table they pass through float32.
void Encoder::project(Chunk& c, const Layer& l, const OwnedMatrix& w, const char* x, const RowScale* scale, int rope,
                      char* out) const {
    const int64_t width = padded(config_.hidden), columns = config_.heads * config_.head_dim;
    const size_t element = bytes_of(l.input);
    if (rope < 0) {
        k_.linear({&w.view, x, scale, width, c.rows, Activation::kIdentity, false, nullptr, nullptr, out, columns,
                   l.attention});
        return;
    }
    const RopeTable& table = ropes_[rope];
    float* wide = Workspace::need<float>(c.w->wide, kBlockRows, std::max(columns, padded(config_.intermediate)));
    for (int r = 0; r < c.rows; r += kBlockRows) {
        const int rows = std::min(kBlockRows, c.rows - r);
        k_.linear({&w.view, x + r * width * element, scale + r, width, rows, Activation::kIdentity, false, nullptr,
                   nullptr, wide, columns, Format::kF32});
        k_.rope(wide, columns, c.positions + r, table.cos.data(), table.sin.data(), rows, config_.heads,
                config_.head_dim, table.half, out + r * columns * bytes_of(l.attention), columns, l.attention);
    }
}

// Attention of every document into w->context, in the format that the output projection reads.
void Encoder::attend(Chunk& c, int index) const {
    const EncoderConfig& g = config_;
    const int64_t columns = g.heads * g.head_dim;
    const Layer& l = layers_[index];
    const size_t element = bytes_of(l.attention), input = bytes_of(l.input);
    const int longest = *std::max_element(c.keys.begin(), c.keys.end());
    char* scratch = Workspace::need(c.w->scratch, k_.attention_scratch(l.attention, longest, g.head_dim));
    char* context = Workspace::need(c.w->context, c.rows, columns * input);
    const bool quantise = l.input == Format::kU8;
    float* f32 = quantise ? Workspace::need<float>(c.w->context_f32, longest, columns) : nullptr;
    for (size_t d = 0; d < c.document.size(); ++d) {
        char* target = context + c.row[d] * columns * input;
        k_.attention({c.w->q.get() + c.row[d] * columns * element, c.w->k.get() + c.key_row[d] * columns * element,
                      c.w->v.get() + c.key_row[d] * columns * element, l.attention, columns, columns, c.queries[d],
                      c.keys[d], c.start[d], g.heads, g.head_dim, g.attention_scale, g.window[index],
                      quantise ? reinterpret_cast<char*>(f32) : target, columns, quantise ? Format::kF32 : l.input,
                      scratch});
        if (quantise)
            k_.convert(f32, columns, c.queries[d], static_cast<int>(columns),
                       {target, columns, c.w->context_scale.as<RowScale>() + c.row[d], nullptr, l.input});
    }
}

// x += the strip's columns of h times their weights, in float32.
void Encoder::add_strip(Chunk& c, const Layer& l, const float* h, int begin, int rows) const {
    const int64_t width = padded(config_.hidden), wide = padded(config_.intermediate);
    const int count = static_cast<int>(l.strip_columns.size());
    const int64_t ld = l.strip.view.k_padded;
    float* x = Workspace::need<float>(c.w->strip_input, kBlockRows, ld);
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < count; ++i) x[r * ld + i] = h[r * wide + l.strip_columns[i]];
    float* y = c.x + begin * width;
    k_.linear({&l.strip.view, x, nullptr, ld, rows, Activation::kIdentity, false, nullptr, y, y, width, Format::kF32});
}

void Encoder::feed_forward(Chunk& c, const Layer& l, int begin, int rows) const {
    const EncoderConfig& g = config_;
    const int64_t width = padded(g.hidden), wide = padded(g.intermediate);
    const bool rounded = l.input != Format::kF32;
    const bool direct = l.input == Format::kBF16;  // the epilogue stores what the next product reads
    const char* x = c.input + begin * width * bytes_of(l.input);
    float* gate = nullptr;
    if (g.gated) {
        gate = Workspace::need<float>(c.w->gate, kBlockRows, wide);
        k_.linear({&l.gate.view, x, c.input_scale + begin, width, rows, Activation::kIdentity, false, nullptr, nullptr,
                   gate, wide, Format::kF32});
    }
    float* h = Workspace::need<float>(c.w->wide, kBlockRows, std::max<int64_t>(wide, g.heads * g.head_dim));
    RowScale* scale = Workspace::need<RowScale>(c.w->down_scale, kBlockRows);
    k_.linear({&l.up.view, x, c.input_scale + begin, width, rows, g.activation, rounded, gate, nullptr, h, wide,
               direct ? Format::kBF16 : Format::kF32});
    const void* down_input = h;
    if (l.input == Format::kU8) {
        char* q = Workspace::need(c.w->wide_input, kBlockRows, wide);
        k_.convert(h, wide, rows, g.intermediate,
                   {q, wide, scale, l.down_factor.empty() ? nullptr : l.down_factor.data(), l.input});
        down_input = q;
        if (!l.strip_columns.empty()) add_strip(c, l, h, begin, rows);
    }
    float* y = c.x + begin * width;
    k_.linear({&l.down.view, down_input, scale, wide, rows, Activation::kIdentity, false, nullptr, y, y, width,
               Format::kF32});
}

// The rows of the layer's input that the products of `reader` will read, in a buffer other than `busy`.
char* Encoder::input_of(Chunk& c, const Layer& reader, const char* busy) const {
    if (reader.input == Format::kF32 && !config_.pre_norm) return reinterpret_cast<char*>(c.x);
    const int64_t bytes = padded(config_.hidden) * bytes_of(reader.input);
    Bytes& buffer = busy && busy == c.w->input.get() ? c.w->other_input : c.w->input;
    return Workspace::need(buffer, c.tokens, bytes);
}

void Encoder::layer(Chunk& c, int index, bool prune) const {
    const EncoderConfig& g = config_;
    const Layer& l = layers_[index];
    const Layer* next = index + 1 < g.layers ? &layers_[index + 1] : nullptr;
    const int64_t width = padded(g.hidden), columns = g.heads * g.head_dim;
    const size_t input = bytes_of(l.input);
    if (g.pre_norm) {
        c.input = input_of(c, l, nullptr);
        norm(c, l.attention_norm, 0, c.rows, false, l, true, c.input);
    }
    const bool values = !l.v_factor.empty();
    const int64_t projected = columns * bytes_of(l.attention);
    project(c, l, l.k, c.input, c.input_scale, g.rope[index], Workspace::need(c.w->k, c.tokens, projected));
    project(c, l, l.v, values ? c.v_input : c.input, values ? c.v_scale : c.input_scale, -1,
            Workspace::need(c.w->v, c.tokens, projected));
    if (prune) {  // keep only the row that the head reads; it moves to the front, and row d >= d documents before it
        for (size_t d = 0; d < c.document.size(); ++d) {
            const int from = c.key_row[d] + c.start[d], to = static_cast<int>(d);
            c.positions[to] = c.positions[from];
            std::memmove(c.x + to * width, c.x + from * width, width * sizeof(float));
            if (c.input != reinterpret_cast<char*>(c.x))
                std::memmove(c.input + to * width * input, c.input + from * width * input, width * input);
            c.input_scale[to] = c.input_scale[from];
            c.row[d] = to;
            c.queries[d] = 1;
        }
        c.rows = static_cast<int>(c.document.size());
    }
    project(c, l, l.q, c.input, c.input_scale, g.rope[index], Workspace::need(c.w->q, c.rows, projected));
    RowScale* context_scale = Workspace::need<RowScale>(c.w->context_scale, c.tokens);
    attend(c, index);
    // Where the formats differ, rows of the next layer's input would overwrite rows that are still to be read.
    char* target = c.input;
    if (!g.pre_norm && next && next->input != l.input) target = input_of(c, *next, c.input);
    for (int r = 0; r < c.rows; r += kBlockRows) {
        const int rows = std::min(kBlockRows, c.rows - r);
        float* x = c.x + r * width;
        k_.linear({&l.o.view, c.w->context.get() + r * columns * input, context_scale + r, columns, rows,
                   Activation::kIdentity, false, nullptr, x, x, width, Format::kF32});
        norm(c, g.pre_norm ? l.output_norm : l.attention_norm, r, rows, !g.pre_norm, l, false, c.input);
        feed_forward(c, l, r, rows);
        if (!g.pre_norm) norm(c, l.output_norm, r, rows, true, next ? *next : l, next != nullptr, target);
    }
    c.input = target;
}

void Encoder::run_chunk(Chunk& c, Readout readout, float* out) const {
    const EncoderConfig& g = config_;
    const int64_t width = padded(g.hidden);
    embed(c);
    const size_t documents = c.document.size();
    c.rows = c.tokens;
    c.row = c.key_row;
    c.queries = c.keys;
    c.start.assign(documents, 0);
    c.input_scale = Workspace::need<RowScale>(c.w->input_scale, c.tokens);
    c.v_input = Workspace::need(c.w->v_input, c.tokens, width);
    c.v_scale = Workspace::need<RowScale>(c.w->v_scale, c.tokens);
    if (!g.pre_norm) {
        c.input = input_of(c, layers_[0], nullptr);
        norm(c, Norm{}, 0, c.tokens, true, layers_[0], true, c.input);
    }
    const bool prune = readout == Readout::kFirst || readout == Readout::kLast;
    for (int i = 0; i < g.layers; ++i) {
        const bool last = prune && i + 1 == g.layers;
        if (last && readout == Readout::kLast)
            for (size_t d = 0; d < documents; ++d) c.start[d] = c.keys[d] - 1;
        layer(c, i, last);
    }
    if (g.pre_norm) {
        float* x = c.x;
        k_.layer_norm({x,
                       width,
                       c.rows,
                       g.hidden,
                       final_norm_.gamma.data(),
                       final_norm_.has_beta ? final_norm_.beta.data() : nullptr,
                       g.eps,
                       x,
                       width,
                       {}});
    }
    read(c, readout, out);
}

// Runs the head's steps on (rows, ldx); returns where the result stands, with stride padded(output_width()).
float* Encoder::apply_head(Chunk& c, float* x, int64_t ldx, int rows) const {
    int64_t widest = 0;
    for (const HeadOp& op : head_) widest = std::max(widest, padded(op.width));
    float* spare[2] = {Workspace::need<float>(c.w->head0, rows, std::max(widest, padded(config_.hidden))),
                       Workspace::need<float>(c.w->head1, rows, widest)};
    int turn = x == spare[0];
    int width = config_.hidden;
    for (const HeadOp& op : head_) {
        float* y = spare[turn];
        const int64_t ldy = padded(op.width);
        if (op.kind == HeadOp::kDense) {
            k_.linear({&op.dense.view, x, nullptr, ldx, rows, op.act, false, nullptr, nullptr, y, ldy, Format::kF32});
        } else if (op.kind == HeadOp::kNorm) {
            k_.layer_norm({x,
                           ldx,
                           rows,
                           op.width,
                           op.norm.gamma.data(),
                           op.norm.has_beta ? op.norm.beta.data() : nullptr,
                           op.eps,
                           y,
                           ldy,
                           {}});
        } else {
            for (int r = 0; r < rows; ++r) {
                double square = 0;
                for (int i = 0; i < width; ++i) square += static_cast<double>(x[r * ldx + i]) * x[r * ldx + i];
                const float inverse = static_cast<float>(1.0 / std::max(std::sqrt(square), 1e-12));
                for (int i = 0; i < ldy; ++i) y[r * ldy + i] = x[r * ldx + i] * inverse;
            }
        }
        x = y;
        ldx = ldy;
        width = op.width;
        turn ^= 1;
    }
    return x;
}

void Encoder::read(Chunk& c, Readout readout, float* out) const {
    const int64_t width = padded(config_.hidden);
    const int n = output_width();
    int rows = c.rows;
    float* x = c.x;
    if (readout == Readout::kMean) {
        rows = static_cast<int>(c.document.size());
        x = Workspace::need<float>(c.w->head0, rows, width);
        for (int d = 0; d < rows; ++d) {
            float* y = x + d * width;
            std::fill(y, y + width, 0.0f);
            for (int t = 0; t < c.keys[d]; ++t)
                for (int64_t i = 0; i < width; ++i) y[i] += c.x[(c.key_row[d] + t) * width + i];
            for (int64_t i = 0; i < width; ++i) y[i] /= static_cast<float>(c.keys[d]);
        }
    }
    // Blocks of rows bound the head's buffers when every token is read; they are aligned to documents' rows only by
    // chance, which is of no matter: a row's result is its own.
    const int block = readout == Readout::kTokens ? kBlockRows : rows;
    std::vector<int64_t> target(rows);
    for (size_t d = 0; d < c.document.size(); ++d) {
        if (readout != Readout::kTokens)
            target[d] = c.document[d];
        else
            for (int t = 0; t < c.keys[d]; ++t) target[c.key_row[d] + t] = c.token[d] + t;
    }
    for (int r = 0; r < rows; r += block) {
        const int count = std::min(block, rows - r);
        const float* y = head_.empty() ? x + r * width : apply_head(c, x + r * width, width, count);
        const int64_t ldy = head_.empty() ? width : padded(n);
        for (int i = 0; i < count; ++i) std::memcpy(out + target[r + i] * n, y + i * ldy, n * sizeof(float));
    }
}

}  // namespace fastrerank::cpu
