// An encoder's weights: checks and packs them, and owns them.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "encoder/encoder.h"

namespace fastrerank::cpu {
namespace {

[[noreturn]] void invalid(const std::string& message) { throw std::invalid_argument(message); }

Norm make_norm(const float* gamma, const float* beta, int n) {
    Norm norm;
    norm.gamma.assign(padded(n), 0.0f);
    norm.beta.assign(padded(n), 0.0f);
    std::copy(gamma, gamma + n, norm.gamma.begin());
    if (beta) std::copy(beta, beta + n, norm.beta.begin());
    norm.has_beta = beta != nullptr;
    for (int i = 0; i < n; ++i)
        if (!std::isfinite(norm.gamma[i]) || !std::isfinite(norm.beta[i]))
            invalid("a norm's weight is NaN or infinite");
    return norm;
}

}  // namespace

std::shared_ptr<char> WeightMemory::take(size_t bytes) {
    constexpr size_t kHugePage = size_t{2} << 20, kChunk = 8 * kHugePage;
    const size_t whole = (bytes + 64 + 63) / 64 * 64;
    if (left_ < whole) {
        const size_t size = (std::max(whole, kChunk) + kHugePage - 1) / kHugePage * kHugePage;
        chunk_ = std::make_shared<Bytes>(size - 64, kHugePage);
        next_ = chunk_->get(), left_ = size;
#ifdef MADV_HUGEPAGE
        madvise(next_, size, MADV_HUGEPAGE);  // a hint: results are the same without it
#endif
    }
    char* p = next_;
    next_ += whole, left_ -= whole;
    return {chunk_, p};
}

// Inner columns of the feed-forward that are computed and read at once. Rows of terms are wide, and a block's inner
// rows would not stay in the second-level cache, so they are cut into about equal parts. Products take 384 inputs at a
// time in any case.
int Encoder::inner_part(const Layer& l) const {
    if (l.input != Format::kTerms) return config_.intermediate;
    const int parts = (config_.intermediate + 383) / 384;
    return static_cast<int>(padded((config_.intermediate + parts - 1) / parts));
}

OwnedMatrix Encoder::make_matrix(Precision precision, const void* w, Source source, int64_t ldw, int n, int k,
                                 const float* bias, const std::string& what) {
    OwnedMatrix m;
    std::shared_ptr<char> memory = memory_.take(k_.packed_bytes(precision, n, k));
    bool ok = m.pack(k_, std::move(memory), precision, w, source, ldw, n, k, bias);
    for (int i = 0; bias && i < n; ++i) ok &= std::isfinite(bias[i]);
    if (!ok) invalid("weight of " + what + " is NaN or infinite: the checkpoint is damaged");
    return m;
}

Layer& Encoder::layer_at(int layer) {
    if (layer < 0 || layer >= config_.layers)
        invalid("layer " + std::to_string(layer) + " is not one of " + std::to_string(config_.layers));
    return layers_[layer];
}

void Encoder::set_linear(int layer, const std::string& name, const void* w, Source source, int64_t ldw, int n, int k,
                         const float* bias) {
    const std::string what = layer < 0 ? name : "layer " + std::to_string(layer) + " " + name;
    const int columns = config_.heads * config_.head_dim;
    const bool query_like = name == "q" || name == "k" || name == "v";
    const int outputs = query_like ? columns : name == "up" || name == "gate" ? config_.intermediate : config_.hidden;
    const int inputs = name == "o"            ? columns
                       : name == "down"       ? config_.intermediate
                       : name == "projection" ? config_.embedding
                                              : config_.hidden;
    if (n != outputs || k != inputs)
        invalid("weight of " + what + " has shape (" + std::to_string(n) + ", " + std::to_string(k) + "), expected (" +
                std::to_string(outputs) + ", " + std::to_string(inputs) + ")");
    if (layer < 0 && name == "projection") {
        projection_ = make_matrix(Precision::kFloat32, w, source, ldw, n, k, bias, what);
        return;
    }
    Layer& l = layer_at(layer);
    const std::pair<const char*, OwnedMatrix*> slots[] = {{"q", &l.q}, {"k", &l.k}, {"v", &l.v}, {"o", &l.o}};
    for (const auto& [slot, target] : slots)
        if (name == slot) {
            *target = make_matrix(l.precision, w, source, ldw, n, k, bias, what);
            return;
        }
    if (name != "up" && name != "gate" && name != "down") invalid("unknown linear layer " + name);
    const int part = inner_part(l);
    for (FeedForward& f : l.parts) {
        const int begin = static_cast<int>(&f - l.parts.data()) * part,
                  count = std::min(part, config_.intermediate - begin);
        const bool down = name == "down";
        const char* from = static_cast<const char*>(w) + begin * (down ? 1 : ldw) * (source == Source::kF32 ? 4 : 2);
        const float* some = down ? begin ? nullptr : bias : bias ? bias + begin : nullptr;
        OwnedMatrix& target = down ? f.down : name == "up" ? f.up : f.gate;
        target = make_matrix(l.precision, from, source, ldw, down ? n : count, down ? count : k, some, what);
    }
}

void Encoder::set_norm(int layer, const std::string& name, const float* gamma, const float* beta, int n) {
    const int width = name == "embedding" ? config_.embedding : config_.hidden;
    if (n != width)
        invalid("the " + name + " norm has " + std::to_string(n) + " weights, expected " + std::to_string(width));
    Norm norm = make_norm(gamma, beta, n);
    if (layer < 0)
        (name == "embedding" ? embedding_norm_ : final_norm_) = std::move(norm);
    else
        (name == "attention" ? layer_at(layer).attention_norm : layer_at(layer).output_norm) = std::move(norm);
}

void Encoder::set_factor(int layer, const std::string& name, const float* factor, int n) {
    Layer& l = layer_at(layer);
    if (name != "v" && name != "up" && name != "down") invalid("no factor for the inputs of " + name);
    const int inputs = name == "down" ? config_.intermediate : config_.hidden;
    if (n != inputs || l.precision != Precision::kInt8)
        invalid("factor of " + name + " has " + std::to_string(n) + " entries, expected " + std::to_string(inputs) +
                " of an int8 layer");
    std::vector<float>& target = name == "v" ? l.v_factor : name == "up" ? l.up_factor : l.down_factor;
    target.assign(padded(n), 0.0f);
    std::copy(factor, factor + n, target.begin());
}

void Encoder::set_strip(int layer, const int32_t* columns, const float* w, int n, int k) {
    Layer& l = layer_at(layer);
    if (n != config_.hidden) invalid("strip has " + std::to_string(n) + " rows, expected one for each output of down");
    for (int i = 0; i < k; ++i)
        if (columns[i] < 0 || columns[i] >= config_.intermediate)
            invalid("strip column " + std::to_string(columns[i]) + " is not an input of down");
    l.strip_columns.assign(columns, columns + k);
    l.strip = make_matrix(Precision::kFloat32, w, Source::kF32, k, n, k, nullptr, "strip");
}

void Encoder::set_tables(const void* word, Source source, const float* position, const float* type) {
    if (word) {
        word_rows_.reset();
        word_ = word;
        word_source_ = source;
    }
    const int64_t width = padded(config_.embedding);
    const auto copy = [&](std::vector<float>& to, const float* from, int rows) {
        if (!from) return;
        to.assign(rows * width, 0.0f);
        for (int64_t r = 0; r < rows; ++r)
            std::copy(from + r * config_.embedding, from + (r + 1) * config_.embedding, to.begin() + r * width);
        for (const float value : to)
            if (!std::isfinite(value)) invalid("a weight of the position or type embeddings is NaN or infinite");
    };
    copy(position_, position, config_.positions);
    copy(type_, type, config_.types);
}

void Encoder::set_word_rows(std::unique_ptr<RowTable> rows, Source source) {
    const int64_t row_bytes = static_cast<int64_t>(config_.embedding) * (source == Source::kF32 ? 4 : 2);
    if (rows->rows() != config_.vocabulary || rows->row_bytes() != row_bytes)
        invalid("word embeddings must have shape (" + std::to_string(config_.vocabulary) + ", " +
                std::to_string(config_.embedding) + ")");
    word_rows_ = std::move(rows);
    word_ = word_rows_->data();
    word_source_ = source;
}

void Encoder::add_rope(float theta, int half) {
    if (!(theta > 0) || !std::isfinite(theta)) invalid("the base of rotary frequencies must be a number above 0");
    if (half < 1 || 2 * static_cast<int64_t>(half) > config_.head_dim)
        invalid("a rotary table must turn 1 to " + std::to_string(config_.head_dim / 2) + " pairs of columns, got " +
                std::to_string(half));
    if (static_cast<int64_t>(config_.positions) * half > int64_t{1} << 28)
        invalid("a rotary table of " + std::to_string(config_.positions) + " positions is too large");
    RopeTable t;
    t.half = half;
    for (int p = 0; p < config_.positions; ++p)
        for (int i = 0; i < half; ++i) {
            // The reference computes frequencies and angles in float32.
            const float frequency = 1.0f / std::pow(theta, static_cast<float>(2 * i) / static_cast<float>(2 * half));
            const float angle = static_cast<float>(p) * frequency;
            t.cos.push_back(std::cos(angle));
            t.sin.push_back(std::sin(angle));
        }
    ropes_.push_back(std::move(t));
}

void Encoder::add_dense(const void* w, Source source, int64_t ldw, int n, int k, const float* bias, Activation act) {
    if (n < 1 || k != output_width()) invalid("a head's layer must read what stands before it");
    HeadOp op;
    op.kind = HeadOp::kDense;
    op.dense = make_matrix(Precision::kFloat32, w, source, ldw, n, k, bias, "head");
    op.act = act;
    op.width = n;
    head_.push_back(std::move(op));
}

void Encoder::add_norm(const float* gamma, const float* beta, int n, float eps) {
    if (n != output_width() || !std::isfinite(eps) || eps < 0)
        invalid("a head's norm must be as wide as what stands before it, its eps a number of at least 0");
    HeadOp op;
    op.kind = HeadOp::kNorm;
    op.norm = make_norm(gamma, beta, n);
    op.eps = eps;
    op.width = n;
    head_.push_back(std::move(op));
}

void Encoder::add_normalize() {
    HeadOp op;
    op.kind = HeadOp::kNormalize;
    op.width = output_width();
    head_.push_back(std::move(op));
}

int Encoder::output_width() const { return head_.empty() ? config_.hidden : head_.back().width; }

size_t Encoder::weight_bytes() const {
    size_t total = (position_.size() + type_.size()) * sizeof(float) + projection_.bytes;
    for (const Layer& l : layers_) {
        for (const OwnedMatrix* m : {&l.q, &l.k, &l.v, &l.o, &l.strip}) total += m->bytes;
        for (const FeedForward& f : l.parts) total += f.up.bytes + f.gate.bytes + f.down.bytes;
    }
    for (const HeadOp& op : head_) total += op.dense.bytes;
    return total;
}

}  // namespace fastrerank::cpu
