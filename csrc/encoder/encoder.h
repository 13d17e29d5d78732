// A transformer encoder over packed documents. One thread takes a chunk of whole documents through all layers, so a
// request costs one fork-join, and activations stay in the core's cache. A document's bits do not depend on the other
// documents, on the chunks or on the number of threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "encoder/row_table.h"
#include "isa/kernels.h"
#include "linear/packed_linear.h"

namespace fastrerank::cpu {

struct EncoderConfig {
    int hidden, layers, heads, head_dim, intermediate;
    int embedding;             // width of the embedding tables; hidden unless a projection follows (ELECTRA)
    int vocabulary, positions, types;
    int position_offset;       // position of a document's first token in the position table
    int pad_id;                // RoBERTa: tokens equal to pad_id have position pad_id and are not counted; else -1
    bool pre_norm;             // norm before each block and once at the end (ModernBERT), else after each block
    bool gated;                // feed-forward is act(up x) * (gate x)
    Activation activation;
    float eps;
    std::vector<int> window;   // per layer; negative: global
    std::vector<int> rope;     // per layer: index of its rotary table, or -1
    float attention_scale;     // usually 1 / sqrt(head size)
    Precision precision;
    int precise_layers;        // int8 only: the number of last layers that run in bfloat16
};

enum class Readout : int { kFirst = 0, kLast = 1, kMean = 2, kTokens = 3 };

// Memory of packed weights, in chunks of huge pages: every forward reads all weights, and with small pages it would
// wait for address translations. The unused rest of a chunk is never touched, so it takes no memory.
class WeightMemory {
public:
    // 64-byte aligned memory, which lives as long as a pointer to it.
    std::shared_ptr<char> take(size_t bytes);

private:
    std::shared_ptr<Bytes> chunk_;
    char* next_ = nullptr;
    size_t left_ = 0;  // bytes of the chunk from next_ on, including the slack of Bytes
};

struct Norm {
    std::vector<float> gamma, beta;  // padded; empty: no norm
    bool has_beta = false;

    // The pass from x (rows, ldx) to y (rows, ldy), n values each.
    LayerNorm of(const float* x, int64_t ldx, int rows, int n, float eps, float* y, int64_t ldy) const {
        return {.x = x,
                .ldx = ldx,
                .rows = rows,
                .n = n,
                .gamma = gamma.data(),
                .beta = has_beta ? beta.data() : nullptr,
                .eps = eps,
                .y = y,
                .ldy = ldy};
    }
};

// A part of the feed-forward's inner columns: rows of up and gate, inputs of down.
struct FeedForward {
    OwnedMatrix up, gate, down;
};

struct Layer {
    Precision precision;
    Format input, attention;  // of the products' inputs; of q, k and v
    OwnedMatrix q, k, v, o;
    std::vector<FeedForward> parts;  // of inner_part() columns each
    Norm attention_norm, output_norm;
    // int8 only: factors, padded, by which the inputs of v, of up and gate, and of down are multiplied before they are
    // rounded; empty: none. The weights are given divided by them.
    std::vector<float> v_factor, up_factor, down_factor;
    OwnedMatrix strip;  // float32 (hidden, columns): the weights of those inputs of down that are not rounded
    std::vector<int> strip_columns;  // these inputs have the factor 0
};

struct HeadOp {
    enum Kind { kDense, kNorm, kNormalize } kind;
    OwnedMatrix dense;
    Activation act = Activation::kIdentity;
    Norm norm;
    float eps = 0;
    int width = 0;  // outputs
};

struct RopeTable {
    std::vector<float> cos, sin;  // (positions, half)
    int half;
};

class Encoder {
public:
    Encoder(const EncoderConfig& config, const Kernels& kernels);
    ~Encoder();

    // Packs a weight as the checkpoint stores it. `name` is q, k, v, o, up, gate or down; with layer -1, projection.
    // Throws std::invalid_argument for NaN and infinity.
    void set_linear(int layer, const std::string& name, const void* w, Source source, int64_t ldw, int n, int k,
                    const float* bias);
    // `name` is attention or output; with layer -1, embedding or final.
    void set_norm(int layer, const std::string& name, const float* gamma, const float* beta, int n);
    // For int8. `name` is v, up (for up and gate) or down, which have n inputs.
    void set_factor(int layer, const std::string& name, const float* factor, int n);
    // For int8: inputs `columns` of down are multiplied in float32 with w (n, k = number of columns).
    void set_strip(int layer, const int32_t* columns, const float* w, int n, int k);
    // The word table is used in place: the caller keeps it alive. The others are copied.
    void set_tables(const void* word, Source source, const float* position, const float* type);
    // A word table of config().vocabulary rows in a file. A row is read when a text first contains its token.
    void set_word_rows(std::unique_ptr<RowTable> rows, Source source);
    void add_rope(float theta, int half);
    void add_dense(const void* w, Source source, int64_t ldw, int n, int k, const float* bias, Activation act);
    void add_norm(const float* gamma, const float* beta, int n, float eps);
    void add_normalize();

    int output_width() const;
    const EncoderConfig& config() const { return config_; }
    const Kernels& kernels() const { return k_; }
    size_t weight_bytes() const;

    // ids, types: (T,) of N documents with document d in [offsets[d], offsets[d + 1]); types may be null.
    // out: (N, output_width), or (T, output_width) for kTokens. Throws std::invalid_argument for an id or a length
    // out of range.
    void forward(const int32_t* ids, const int32_t* types, const int64_t* offsets, int documents, Readout readout,
                 int threads, float* out) const;

private:
    struct Chunk;
    struct Workspace;
    int inner_part(const Layer& l) const;
    Layer& layer_at(int layer);
    void check_complete() const;
    OwnedMatrix make_matrix(Precision precision, const void* w, Source source, int64_t ldw, int n, int k,
                            const float* bias, const std::string& what);
    void check(const int32_t* ids, const int32_t* types, const int64_t* offsets, int documents) const;
    std::unique_ptr<Workspace> take_workspace() const;
    void give_back(std::unique_ptr<Workspace> w, int threads) const;
    void run_chunk(Chunk& chunk, Readout readout, int threads, float* out) const;
    std::vector<Chunk> split(const Chunk& c, int count) const;
    void embed(Chunk& c) const;
    char* input_of(Chunk& c, const Layer& reader, const char* busy) const;
    void keys_and_values(Chunk& c, int index) const;
    void prune(Chunk& c, int index, Readout readout) const;
    void layer(Chunk& c, int index, char* target) const;
    void project(Chunk& c, const Layer& l, const OwnedMatrix& w, const char* x, const RowScale* scale, int rope,
                 char* out) const;
    void attend(Chunk& c, int index) const;
    void feed_forward(Chunk& c, const Layer& l, int begin, int rows) const;
    void norm(Chunk& c, const Norm& norm, int begin, int rows, bool keep, const Layer& reader, bool attention,
              char* input) const;
    void add_strip(Chunk& c, const Layer& l, const float* h, int begin, int rows) const;
    void read(Chunk& c, Readout readout, float* out) const;
    int64_t head_width() const;
    float* apply_head(Chunk& c, float* x, int64_t ldx, int rows) const;

    EncoderConfig config_;
    const Kernels& k_;
    // Tokens of a chunk: enough rows to reuse a streamed weight panel, and few enough that a chunk's activations stay
    // in L2. Tile products consume weights faster than they arrive from beyond L2. There a chunk grows with the model's
    // width, as does the ratio of the traffic of weights to that of activations.
    int chunk_tokens_ = 160;
    // Rows that go through output projection, norms and feed-forward together, which bounds the widest buffers. It is a
    // multiple of every level's row tile, because a product in place must not touch the next block's rows.
    int block_rows_ = 72;
    const void* word_ = nullptr;
    std::unique_ptr<RowTable> word_rows_;
    Source word_source_ = Source::kF32;
    std::vector<float> position_, type_;
    WeightMemory memory_;
    std::vector<Layer> layers_;
    OwnedMatrix projection_;
    Norm embedding_norm_, final_norm_;
    std::vector<RopeTable> ropes_;
    std::vector<HeadOp> head_;
    mutable std::vector<std::unique_ptr<Workspace>> idle_;  // reused by later calls; schedule.cpp holds the lock
};

}  // namespace fastrerank::cpu
