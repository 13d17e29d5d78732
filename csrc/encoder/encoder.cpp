#include "encoder/encoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "encoder/chunk.h"
#include "runtime/stop.h"

namespace fastrerank::cpu {
namespace {

[[noreturn]] void invalid(const std::string& message) { throw std::invalid_argument(message); }

// Larger sizes mean a damaged file. Within these limits no product of two sizes overflows.
constexpr int kMaxSize = 1 << 24, kMaxLayers = 1 << 16;

void check_config(const EncoderConfig& g) {
    const auto within = [](const char* name, int64_t value, int64_t low, int64_t high) {
        if (value < low || value > high)
            invalid(std::string(name) + " must be " + std::to_string(low) + " to " + std::to_string(high) + ", got " +
                    std::to_string(value));
    };
    within("hidden", g.hidden, 1, kMaxSize);
    within("layers", g.layers, 1, kMaxLayers);
    within("heads", g.heads, 1, kMaxSize);
    within("head_dim", g.head_dim, 1, kMaxSize);
    within("heads * head_dim", static_cast<int64_t>(g.heads) * g.head_dim, 1, kMaxSize);
    within("intermediate", g.intermediate, 1, kMaxSize);
    within("embedding", g.embedding, 1, kMaxSize);
    within("vocabulary", g.vocabulary, 1, 1 << 30);
    within("positions", g.positions, 1, kMaxSize);
    within("types", g.types, 0, kMaxSize);
    within("position_offset", g.position_offset, 0, g.positions - 1);
    within("pad_id", g.pad_id, -1, g.positions - 1);
    within("precise_layers", g.precise_layers, 0, g.layers);
    within("entries of window", static_cast<int64_t>(g.window.size()), g.layers, g.layers);
    within("entries of rope", static_cast<int64_t>(g.rope.size()), g.layers, g.layers);
    if (g.head_dim % 16) invalid("head_dim must be padded to a multiple of 16");
    if (!std::isfinite(g.eps) || g.eps < 0) invalid("eps must be a number of at least 0");
    if (!std::isfinite(g.attention_scale)) invalid("attention_scale must be finite");
}

// Queries of a document between two calls of check_stop: all, unless they take more than some 0.1 s. Each piece packs
// the keys again, which takes little time beside its products.
int attention_piece(int queries, int keys, int window) {
    constexpr int64_t kScores = 1 << 22;
    if (window >= 0 || static_cast<int64_t>(queries) * keys <= kScores) return std::max(queries, 1);
    return static_cast<int>(std::max<int64_t>(kScores / keys / kPartRows, 1)) * kPartRows;
}

}  // namespace

Encoder::Encoder(const EncoderConfig& config, const Kernels& kernels) : config_(config), k_(kernels) {
    check_config(config);
    layers_.resize(config.layers);
    if (k_.tiles) {
        chunk_tokens_ = std::max(chunk_tokens_, config.hidden * 5 / 6);
        block_rows_ = (chunk_tokens_ / 4 + 31) / 32 * 32;
        // Every block of rows splits the weights into terms again.
        if (config.precision == Precision::kFloat32) block_rows_ = std::max(block_rows_, 320);
    }
    for (int i = 0; i < config.layers; ++i) {
        Layer& l = layers_[i];
        const bool precise = config.precision == Precision::kInt8 && i >= config.layers - config.precise_layers;
        l.precision = precise ? Precision::kBFloat16 : config.precision;
        l.input = k_.input_format(l.precision);
        l.attention = k_.attention_format[static_cast<int>(l.precision)];
        l.parts.resize((config.intermediate + inner_part(l) - 1) / inner_part(l));
    }
}

Encoder::~Encoder() = default;

// Checks that every weight that a forward reads has been set, with the right size.
void Encoder::check_complete() const {
    const EncoderConfig& g = config_;
    // Every forward calls this, so the message is only made where something is missing.
    const auto need = [](bool there, const char* what, int layer = -1) {
        if (!there) invalid(what + (layer < 0 ? "" : " of layer " + std::to_string(layer)) + " was not set");
    };
    need(word_ != nullptr, "the word table");
    need(!embedding_norm_.gamma.empty(), "the embedding norm");
    need(!g.pre_norm || !final_norm_.gamma.empty(), "the final norm");
    need(g.embedding == g.hidden || projection_.bytes, "the projection");
    for (int i = 0; i < g.layers; ++i) {
        const Layer& l = layers_[i];
        for (const OwnedMatrix* m : {&l.q, &l.k, &l.v, &l.o}) need(m->bytes != 0, "a matrix of the attention", i);
        for (const FeedForward& f : l.parts)
            need(f.up.bytes && f.down.bytes && (!g.gated || f.gate.bytes), "a matrix of the feed-forward", i);
        need(g.pre_norm || !l.attention_norm.gamma.empty(), "the attention norm", i);
        need(!l.output_norm.gamma.empty(), "the output norm", i);
        need(g.rope[i] < static_cast<int>(ropes_.size()), "the rotary table", i);
    }
}

void Encoder::check(const int32_t* ids, const int32_t* types, const int64_t* offsets, int documents) const {
    check_complete();
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
        if (word_rows_) word_rows_->need(ids[t]);
        if (types && !type_.empty() && (types[t] < 0 || types[t] >= config_.types))
            invalid("token type " + std::to_string(types[t]) + " is outside the model's " +
                    std::to_string(config_.types));
    }
}

void Encoder::embed(Chunk& c) const {
    const EncoderConfig& g = config_;
    const int64_t width = padded(g.hidden), ld = padded(g.embedding);
    c.x = Workspace::need<float>(c.w->x, c.tokens, width);
    float* target = projection_.bytes ? Workspace::need<float>(c.w->context_f32, c.tokens, ld) : c.x;
    k_.embed({.ids = c.ids,
              .positions = c.positions,
              .types = c.types,
              .word = word_,
              .word_source = word_source_,
              .position = position_.empty() ? nullptr : position_.data(),
              .type = type_.empty() ? nullptr : type_.data(),
              .rows = c.tokens,
              .n = g.embedding,
              .x = target,
              .ldx = ld});
    k_.layer_norm(embedding_norm_.of(target, ld, c.tokens, g.embedding, g.eps, target, ld));
    if (projection_.bytes)
        k_.linear({.w = &projection_.view, .x = target, .ldx = ld, .rows = c.tokens, .y = c.x, .ldy = width});
}

// Norm of the rows [begin, begin + rows) of x. It is written to x itself (`keep`) and to `input` for the products of
// `reader`: those of its feed-forward, or of its attention, with a second copy for v where its columns have factors.
void Encoder::norm(Chunk& c, const Norm& norm, int begin, int rows, bool keep, const Layer& reader, bool attention,
                   char* input) const {
    const int64_t width = padded(config_.hidden);
    float* x = c.x + begin * width;
    const int64_t ld = row_stride(reader.input, width), at = begin * ld * static_cast<int64_t>(bytes_of(reader.input));
    const bool factors = reader.input == Format::kU8;
    Stored first{.q = input + at, .ldq = ld, .scale = c.input_scale + begin, .format = reader.input}, values{};
    if (input == reinterpret_cast<char*>(c.x)) first.q = nullptr;
    if (factors && !attention && !reader.up_factor.empty()) first.factor = reader.up_factor.data();
    if (factors && attention && !reader.v_factor.empty())
        values = {.q = c.v_input + at,
                  .ldq = width,
                  .scale = c.v_scale + begin,
                  .factor = reader.v_factor.data(),
                  .format = reader.input};
    if (norm.gamma.empty()) {
        for (const Stored& s : {first, values})
            if (s.q) k_.convert(x, width, rows, config_.hidden, s);
        return;
    }
    float* y = keep ? x : Workspace::need<float>(c.w->head0, 1, width);
    LayerNorm pass = norm.of(x, width, rows, config_.hidden, config_.eps, y, keep ? width : 0);
    pass.inputs[0] = first;
    pass.inputs[1] = values;
    k_.layer_norm(pass);
}

// Queries, keys or values in the attention's format. With a rotary table they are float32 in between.
void Encoder::project(Chunk& c, const Layer& l, const OwnedMatrix& w, const char* x, const RowScale* scale, int rope,
                      char* out) const {
    const int64_t columns = config_.heads * config_.head_dim, ld = row_stride(l.input, padded(config_.hidden));
    const size_t element = bytes_of(l.input);
    const bool terms = l.input == Format::kTerms;
    if (rope < 0) {
        k_.linear({.w = &w.view,
                   .x = x,
                   .x_scale = scale,
                   .ldx = ld,
                   .rows = c.rows,
                   .y = out,
                   .ldy = columns,
                   .y_format = l.attention,
                   .terms = terms});
        return;
    }
    const RopeTable& table = ropes_[rope];
    float* wide = Workspace::need<float>(c.w->wide, block_rows_, std::max(columns, padded(config_.intermediate)));
    for (int r = 0; r < c.rows; r += block_rows_) {
        const int rows = std::min(block_rows_, c.rows - r);
        k_.linear({.w = &w.view,
                   .x = x + r * ld * element,
                   .x_scale = scale + r,
                   .ldx = ld,
                   .rows = rows,
                   .y = wide,
                   .ldy = columns,
                   .terms = terms});
        k_.rope(wide, columns, c.positions + r, table.cos.data(), table.sin.data(), rows, config_.heads,
                config_.head_dim, table.half, out + r * columns * bytes_of(l.attention), columns, l.attention);
    }
}

// Writes the attention of every document to w->context, in the format that the output projection reads.
void Encoder::attend(Chunk& c, int index) const {
    const EncoderConfig& g = config_;
    const int64_t columns = g.heads * g.head_dim;
    const Layer& l = layers_[index];
    const size_t element = bytes_of(l.attention), input = bytes_of(l.input);
    const int longest = *std::max_element(c.keys.begin(), c.keys.end());
    char* scratch = Workspace::need(c.w->scratch, k_.self_attention_scratch(l.attention, longest, g.head_dim));
    const int64_t ld = row_stride(l.input, columns);
    char* context = Workspace::need(c.w->context, c.rows, ld * input);
    const bool converted = l.input == Format::kU8 || l.input == Format::kTerms;
    float* f32 = converted ? Workspace::need<float>(c.w->context_f32, longest, columns) : nullptr;
    for (size_t d = 0; d < c.document.size(); ++d) {
        char* target = context + c.row[d] * ld * input;
        char* out = converted ? reinterpret_cast<char*>(f32) : target;
        const Format out_format = converted ? Format::kF32 : l.input;
        const int piece = attention_piece(c.queries[d], c.keys[d], g.window[index]);
        for (int begin = 0; begin < c.queries[d]; begin += piece) {
            check_stop();
            k_.self_attention({.q = c.w->q.get() + (c.row[d] + begin) * columns * element,
                               .k = c.k + c.key_row[d] * columns * element,
                               .v = c.v + c.key_row[d] * columns * element,
                               .format = l.attention,
                               .ldq = columns,
                               .ldk = columns,
                               .queries = std::min(piece, c.queries[d] - begin),
                               .keys = c.keys[d],
                               .query_start = c.start[d] + begin,
                               .heads = g.heads,
                               .head_dim = g.head_dim,
                               .scale = g.attention_scale,
                               .window = g.window[index],
                               .out = out + begin * columns * static_cast<int64_t>(bytes_of(out_format)),
                               .ldo = columns,
                               .out_format = out_format,
                               .scratch = scratch});
        }
        if (converted)
            k_.convert(
                f32, columns, c.queries[d], static_cast<int>(columns),
                {.q = target, .ldq = ld, .scale = c.w->context_scale.as<RowScale>() + c.row[d], .format = l.input});
    }
}

// x += the strip's columns of h times their weights, in float32.
void Encoder::add_strip(Chunk& c, const Layer& l, const float* h, int begin, int rows) const {
    const int64_t width = padded(config_.hidden), wide = padded(config_.intermediate);
    const int count = static_cast<int>(l.strip_columns.size());
    const int64_t ld = l.strip.view.k_padded;
    float* x = Workspace::need<float>(c.w->strip_input, block_rows_, ld);
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < count; ++i) x[r * ld + i] = h[r * wide + l.strip_columns[i]];
    float* y = c.x + begin * width;
    k_.linear({.w = &l.strip.view, .x = x, .ldx = ld, .rows = rows, .add = y, .y = y, .ldy = width});
}

// x += the feed-forward of `rows` rows from `begin` on. Its input is in c.input.
void Encoder::feed_forward(Chunk& c, const Layer& l, int begin, int rows) const {
    const EncoderConfig& g = config_;
    const bool terms = l.input == Format::kTerms;
    const int64_t width = padded(g.hidden), ld = row_stride(l.input, width),
                  wide = row_stride(l.input, padded(inner_part(l)));
    const bool rounded = l.input != Format::kF32 && !terms;
    const bool direct = l.input == Format::kBF16 || terms;  // the epilogue writes the next product's inputs
    const char* x = c.input + begin * ld * bytes_of(l.input);
    const int64_t widest = std::max<int64_t>(wide, g.heads * g.head_dim) * std::max<int64_t>(4, bytes_of(l.input));
    float* h = reinterpret_cast<float*>(Workspace::need(c.w->wide, block_rows_, widest));
    RowScale* scale = Workspace::need<RowScale>(c.w->down_scale, block_rows_);
    float* y = c.x + begin * width;
    for (const FeedForward& f : l.parts) {
        Linear product{.x = x, .x_scale = c.input_scale + begin, .ldx = ld, .rows = rows, .ldy = wide, .terms = terms};
        if (g.gated) {
            float* gate = Workspace::need<float>(c.w->gate, block_rows_, wide);
            product.w = &f.gate.view;
            product.y = gate;
            k_.linear(product);
            product.mul = gate;
        }
        product.w = &f.up.view;
        product.act = g.activation;
        product.fast_act = rounded;
        product.y = h;
        product.y_format = direct ? l.input : Format::kF32;
        k_.linear(product);
        const void* down_input = h;
        if (l.input == Format::kU8) {
            char* q = Workspace::need(c.w->wide_input, block_rows_, wide);
            k_.convert(h, wide, rows, g.intermediate,
                       {.q = q,
                        .ldq = wide,
                        .scale = scale,
                        .factor = l.down_factor.empty() ? nullptr : l.down_factor.data(),
                        .format = l.input});
            down_input = q;
            if (!l.strip_columns.empty()) add_strip(c, l, h, begin, rows);
        }
        k_.linear({.w = &f.down.view,
                   .x = down_input,
                   .x_scale = scale,
                   .ldx = wide,
                   .rows = rows,
                   .add = y,
                   .y = y,
                   .ldy = width,
                   .terms = terms});
    }
}

// The buffer, other than `busy`, for the inputs of the products of `reader`.
char* Encoder::input_of(Chunk& c, const Layer& reader, const char* busy) const {
    if (reader.input == Format::kF32 && !config_.pre_norm) return reinterpret_cast<char*>(c.x);
    const int64_t bytes = row_stride(reader.input, padded(config_.hidden)) * bytes_of(reader.input);
    Bytes& buffer = busy && busy == c.w->input.get() ? c.w->other_input : c.w->input;
    return Workspace::need(buffer, c.tokens, bytes);
}

// Computes the rows of k and v that belong to c's rows.
void Encoder::keys_and_values(Chunk& c, int index) const {
    const EncoderConfig& g = config_;
    const Layer& l = layers_[index];
    const int64_t at = c.begin * g.heads * g.head_dim * static_cast<int64_t>(bytes_of(l.attention));
    if (g.pre_norm) norm(c, l.attention_norm, 0, c.rows, false, l, true, c.input);
    const bool factors = !l.v_factor.empty();
    project(c, l, l.k, c.input, c.input_scale, g.rope[index], c.k + at);
    project(c, l, l.v, factors ? c.v_input : c.input, factors ? c.v_scale : c.input_scale, -1, c.v + at);
}

// Keeps only the row of each document that the head reads, as row d. No row is overwritten before it is moved, because
// document d has at least d rows before it.
void Encoder::prune(Chunk& c, int index, Readout readout) const {
    const Format format = layers_[index].input;
    const int64_t width = padded(config_.hidden), row = row_stride(format, width) * bytes_of(format);
    for (size_t d = 0; d < c.document.size(); ++d) {
        if (readout == Readout::kLast) c.start[d] = c.keys[d] - 1;
        const int from = c.key_row[d] + c.start[d], to = static_cast<int>(d);
        c.positions[to] = c.positions[from];
        std::memmove(c.x + to * width, c.x + from * width, width * sizeof(float));
        if (c.input != reinterpret_cast<char*>(c.x)) std::memmove(c.input + to * row, c.input + from * row, row);
        c.input_scale[to] = c.input_scale[from];
        c.row[d] = to;
        c.queries[d] = 1;
    }
    c.rows = static_cast<int>(c.document.size());
}

// Runs the layer from its queries on, and writes the next layer's input to `target`.
void Encoder::layer(Chunk& c, int index, char* target) const {
    const EncoderConfig& g = config_;
    const Layer& l = layers_[index];
    const Layer* next = index + 1 < g.layers ? &layers_[index + 1] : nullptr;
    const int64_t width = padded(g.hidden), columns = g.heads * g.head_dim, ld = row_stride(l.input, columns);
    const size_t input = bytes_of(l.input);
    project(c, l, l.q, c.input, c.input_scale, g.rope[index],
            Workspace::need(c.w->q, c.rows, columns * bytes_of(l.attention)));
    RowScale* context_scale = Workspace::need<RowScale>(c.w->context_scale, c.rows);
    attend(c, index);
    // Blocks are of about equal size: a last block of few rows would read all weights for little work.
    const int blocks = std::max((c.rows + block_rows_ - 1) / block_rows_, 1), unit = k_.tiles ? 32 : kPartRows;
    const int block = ((c.rows + blocks - 1) / blocks + unit - 1) / unit * unit;
    for (int r = 0; r < c.rows; r += block) {
        check_stop();
        const int rows = std::min(block, c.rows - r);
        float* x = c.x + r * width;
        k_.linear({.w = &l.o.view,
                   .x = c.w->context.get() + r * ld * input,
                   .x_scale = context_scale + r,
                   .ldx = ld,
                   .rows = rows,
                   .add = x,
                   .y = x,
                   .ldy = width,
                   .terms = l.input == Format::kTerms});
        norm(c, g.pre_norm ? l.output_norm : l.attention_norm, r, rows, !g.pre_norm, l, false, c.input);
        feed_forward(c, l, r, rows);
        if (!g.pre_norm) norm(c, l.output_norm, r, rows, true, next ? *next : l, next != nullptr, target);
    }
}

// The widest row that the head's buffers hold.
int64_t Encoder::head_width() const {
    int64_t widest = padded(config_.hidden);
    for (const HeadOp& op : head_) widest = std::max(widest, padded(op.width));
    return widest;
}

// Runs the head's steps on x (rows, ldx). Returns the result, of stride padded(output_width()).
float* Encoder::apply_head(Chunk& c, float* x, int64_t ldx, int rows) const {
    const int64_t widest = head_width();
    float* spare[2] = {Workspace::need<float>(c.w->head0, rows, widest),
                       Workspace::need<float>(c.w->head1, rows, widest)};
    int turn = x == spare[0];
    int width = config_.hidden;
    for (const HeadOp& op : head_) {
        float* y = spare[turn];
        const int64_t ldy = padded(op.width);
        if (op.kind == HeadOp::kDense) {
            k_.linear({.w = &op.dense.view, .x = x, .ldx = ldx, .rows = rows, .act = op.act, .y = y, .ldy = ldy});
        } else if (op.kind == HeadOp::kNorm) {
            k_.layer_norm(op.norm.of(x, ldx, rows, op.width, op.eps, y, ldy));
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
        x = Workspace::need<float>(c.w->head0, rows,
                                   head_width());  // as large as apply_head needs it, so that it is not reallocated
        for (int d = 0; d < rows; ++d) {
            float* y = x + d * width;
            std::fill(y, y + width, 0.0f);
            for (int t = 0; t < c.keys[d]; ++t)
                for (int64_t i = 0; i < width; ++i) y[i] += c.x[(c.key_row[d] + t) * width + i];
            for (int64_t i = 0; i < width; ++i) y[i] /= static_cast<float>(c.keys[d]);
        }
    }
    // Blocks of rows bound the head's buffers when every token is read. They need not begin with a document, because a
    // row's result depends on that row alone.
    const int block = readout == Readout::kTokens ? block_rows_ : rows;
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
