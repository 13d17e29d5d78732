// A transformer encoder over packed documents: one thread takes a chunk of whole documents through all layers, so a
// request costs one fork-join and activations stay in the core's cache. A document's result is bitwise independent
// of the other documents, of the chunking and of the number of threads.
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
    int pad_id;                // RoBERTa: tokens equal to pad_id take position pad_id and are not counted; else -1
    bool pre_norm;             // norm before each block and once at the end (ModernBERT), else after each block
    bool gated;                // feed-forward is act(up x) * (gate x)
    Activation activation;
    float eps;
    std::vector<int> window;   // per layer; negative: global
    std::vector<int> rope;     // per layer: index of its rotary table, or -1
    float attention_scale;     // usually 1 / sqrt(head size)
    Precision precision;
    int precise_layers;        // of int8: the last ones, which run in bfloat16
};

enum class Readout : int { kFirst = 0, kLast = 1, kMean = 2, kTokens = 3 };

// Memory of packed weights, in chunks of which whole huge pages are asked for: a forward reads all weights again and
// again, and with small pages waits for their translations. What a chunk has left is never touched.
class WeightMemory {
public:
    // 64-byte aligned; it lives as long as somebody holds it.
    std::shared_ptr<char> take(size_t bytes);

private:
    std::shared_ptr<Bytes> chunk_;
    char* next_ = nullptr;
    size_t left_ = 0;  // bytes of the chunk from next_ on, a Bytes' slack included
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

// Some of the feed-forward's inner columns: rows of up and gate, inputs of down.
struct FeedForward {
    OwnedMatrix up, gate, down;
};

struct Layer {
    Precision precision;
    Format input, attention;  // what the products read; how q, k and v are stored
    OwnedMatrix q, k, v, o;
    std::vector<FeedForward> parts;  // of inner_part() columns each
    Norm attention_norm, output_norm;
    // int8 only. What the inputs of v, of up and gate, and of down are multiplied by before they are rounded, padded;
    // empty: nothing. The weights came divided by it.
    std::vector<float> v_factor, up_factor, down_factor;
    OwnedMatrix strip;              // float32 (hidden, columns): those inputs of down that are not rounded
    std::vector<int> strip_columns; // their factor is 0
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

    // Weights arrive one by one as the checkpoint stores them and are packed at once. `name` is one of q, k, v, o, up,
    // gate, down, or, with layer -1, projection. Throws std::invalid_argument on NaN or infinity.
    void set_linear(int layer, const std::string& name, const void* w, Source source, int64_t ldw, int n, int k,
                    const float* bias);
    // attention, output; with layer -1: embedding, final.
    void set_norm(int layer, const std::string& name, const float* gamma, const float* beta, int n);
    // For int8. name is v, up (and gate) or down; n inputs.
    void set_factor(int layer, const std::string& name, const float* factor, int n);
    // For int8: inputs `columns` of down are multiplied in float32 with w (n, k = number of columns).
    void set_strip(int layer, const int32_t* columns, const float* w, int n, int k);
    // The word table is used in place: the caller keeps it alive. The others are copied.
    void set_tables(const void* word, Source source, const float* position, const float* type);
    // A word table of config().vocabulary rows in a file, whose rows are read when a text first has them.
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
    // Tokens per chunk: enough rows to reuse a streamed weight panel, few enough that a chunk's activations stay in L2.
    // Products on tiles take weights faster than they come from beyond it: there a chunk grows with the model's width,
    // as the traffic of weights over that of activations does.
    int chunk_tokens_ = 160;
    // Rows that go through output projection, norms and feed-forward together: bounds the widest buffers. A multiple of
    // every level's row tile (8, 6, 4), because a product that works in place must not touch the next block's rows.
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
    mutable std::vector<std::unique_ptr<Workspace>> idle_;  // reused by later calls; schedule.cpp has the lock
};

}  // namespace fastrerank::cpu
