// The CPU kernels' interface: plain structs and one table of function pointers per instruction-set level.
//
// Layout rules that hold everywhere below:
//   * Rows are row-major with a stride in elements, rounded up to `padded(n)`; padding columns hold finite values
//     and always meet zero weights.
//   * Nothing here allocates, throws, locks or knows Python.
//   * A row's result depends on that row alone: every level sums in one fixed order whatever tile the row falls in.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastrerank::cpu {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
constexpr int kLevels = 5;
enum class Precision : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

// How an activation matrix is stored. kU8: round(x / scale) + zero, with a RowScale per row. kTerms: three bfloat16
// that add up to the float32; a row's first terms are followed by its second, `ld` values further, and its third.
enum class Format : int { kF32 = 0, kBF16 = 1, kU8 = 2, kTerms = 3 };
struct RowScale {
    float scale;
    int32_t zero;
};

// How a weight or embedding tensor is stored in a checkpoint.
enum class Source : int { kF32 = 0, kF16 = 1, kBF16 = 2 };

enum class Activation : int { kIdentity = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kTanh = 4, kSilu = 5, kSigmoid = 6 };

constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
constexpr size_t bytes_of(Format f) {
    return f == Format::kF32 ? 4 : f == Format::kTerms ? 6 : f == Format::kBF16 ? 2 : 1;
}

// y = x W^T + b with W (n outputs, k inputs), packed for one level: panels of columns, k-major inside a panel.
struct PackedMatrix {
    Precision precision;
    int n, k;             // true sizes
    int n_padded;         // columns stored: n rounded up to a vector
    int k_padded;         // inputs stored: k rounded up to 4
    const char* data;     // panels
    const float* scale;   // (n_padded,) per output channel, int8 only
    const float* sum;     // (n_padded,) scale * sum over k of the quantised weights, int8 only
    const float* bias;    // (n_padded,), zeros where the layer has none
};

// Rows are taken in tiles of at most kRowTile: x, x_scale, mul, add and y are read or written for rows rounded up to
// it, and what stands in the rows beyond `rows` is of no matter.
constexpr int kRowTile = 8;
struct Linear {
    const PackedMatrix* w;
    const void* x;        // (rows, ldx) in the format that w's precision reads
    const RowScale* x_scale; // (rows,), kU8 only
    int64_t ldx;
    int rows;
    Activation act;
    bool fast_act;        // polynomial GELU with error <= 1.8e-4, for outputs that are rounded to 8 or 16 bits
    const float* mul;     // y *= mul (rows, ldy) after the activation, or null
    const float* add;     // y += add (rows, ldy), or null
    void* y;              // (rows, ldy), columns [0, n_padded) are written
    int64_t ldy;
    Format y_format;      // kF32 or kBF16; kTerms where x is
    bool terms;           // x is kTerms: float32 weights, where they have that as their input format; else x is kF32
};

// One document's self-attention over all heads. Query row i stands at position query_start + i and sees the keys
// whose position differs by at most `window` (negative: all).
struct Attention {
    const void *q, *k, *v; // (queries, ldq), (keys, ldk), (keys, ldk): head h in columns [h * head_dim, ...)
    Format format;         // of q, k, v: kF32 or kBF16
    int64_t ldq, ldk;
    int queries, keys, query_start;
    int heads, head_dim;   // head_dim is a multiple of 16
    float scale;
    int window;
    void* out;             // (queries, ldo)
    int64_t ldo;
    Format out_format;     // kF32, or kBF16 where the level has it
    char* scratch;         // attention_scratch(keys, head_dim) bytes, 64-aligned
};

// Attention of T rows in which row i sees the keys [lo[i], hi[i]) of up to two lists of intervals, which do not
// overlap. Query head h reads key head h / group. A row without keys gets zeros and a log-sum of -infinity.
struct IntervalAttention {
    const char *q, *k, *v;
    char* out;
    float* lse;            // (T, heads) natural logarithms of the softmax's denominators, or null
    int64_t q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head; // strides in elements
    Format format;         // of q, k, v and out: kF32 or kBF16
    int heads, group, head_dim; // head_dim is a multiple of 8, at most 256
    float scale;           // positive
    float softcap;         // scores become softcap * tanh(score / softcap); 0: they stay
    const int32_t *lo[2], *hi[2]; // (T,) each; a list may be null
};

// Consecutive rows whose intervals of one list are not empty and of which neither end moves back or by more than one
// key from row to row. Blocks of keys are counted from key_begin, the first key of the run's first row.
//
// Where all rows of a run of the second list begin at key_begin and see one and the same interval of the first list,
// that prefix is put before their own keys, as if they were one interval: then a row's bits are those it would have if
// its prefix were not shared. The first list has no run for such rows.
struct KeyRun {
    int row_begin, row_end, key_begin;
    int prefix_begin, prefix_keys; // prefix_keys is 0 where there is no such prefix

    bool joined() const { return prefix_keys > 0; }
    int key(int position) const { // the key at a position of a joined run, counted from its prefix's first
        return position < prefix_keys ? prefix_begin + position : key_begin + position - prefix_keys;
    }
};

// The rows [row_begin, row_end) for the queries of one key head. runs[list] is the first run of the list that reaches
// into the rows; runs_end[list] closes the list.
struct IntervalTask {
    int kv_head, row_begin, row_end;
    const KeyRun *runs[2], *runs_end[2];
    char* scratch;         // interval_scratch(head_dim, (row_end - row_begin) * group) bytes, 64-aligned
};

// out[t] += sum over heads h of head_weight[h] * sum over rows r with lo[r] <= t < hi[r] of
// row_weight[r] * exp(softcap(scale * q[r][h] . k[t][h / group]) - lse[r][h]), float32 from the load on. Heads of
// weight 0 and rows whose lse is -infinity are left out.
constexpr int kMassPanel = 48; // a multiple of every level's panel of keys
struct AttentionMass {
    const void *q, *k;
    Source source;             // of q and k
    int64_t q_row, q_head, k_row, k_head; // strides in elements
    int rows, keys, heads, group, head_dim;
    const float* lse;          // (rows, heads)
    const int32_t *lo, *hi;    // (rows,)
    const float* row_weight;   // (rows,)
    const float* head_weight;  // (heads,) or null
    float scale;
    float softcap;             // 0: scores stay
    bool per_head;             // out is (heads, keys), of stride out_head; head_weight is null
    float* out;                // (keys,)
    int64_t out_head;
};

// logits[r][j] = softcap(normed(x[r]) . w[j] * scale + bias[j]), float32 from the load on; NaN and infinities pass.
enum class RowNorm : int { kNone = 0, kRms = 1, kLayer = 2 };
constexpr int kLabelRows = 4;
struct LabelLogits {
    const void* x;             // (rows, ldx)
    Source x_source;
    int64_t ldx, rows;
    const void* w;             // (labels, ldw)
    Source w_source;
    int64_t ldw;
    int labels, n;
    RowNorm norm;
    const float *gamma, *beta; // (n,), either may be null
    float eps;
    const float* bias;         // (labels,) or null
    float scale, softcap;      // softcap * tanh(logit / softcap); 0: they stay
    float* out;                // (rows, labels)
};

// Rows of float32 as a product reads them; columns [0, padded(n)) are written.
struct Stored {
    void* q;             // null: not wanted
    int64_t ldq;
    RowScale* scale;     // (rows,), kU8 only
    const float* factor; // (padded(n),) what columns are multiplied by before rounding, or null; kU8 only
    Format format;
};

// y = (x - mean) / sqrt(var + eps) * gamma + beta, stored as float32 and as up to two products' inputs.
struct LayerNorm {
    const float* x;
    int64_t ldx;
    int rows, n;
    const float *gamma, *beta; // (padded(n),), zero in the padding; beta may be null
    float eps;
    float* y;                  // may be x itself
    int64_t ldy;
    Stored inputs[2];
};

// x = word[id] + position[pos] + type[type_id]; null tables are left out.
struct Embed {
    const int32_t *ids, *positions, *types;
    const void* word;          // (vocabulary, n) as stored in the checkpoint
    Source word_source;
    const float *position, *type; // (.., padded(n))
    int rows, n;
    float* x;
    int64_t ldx;
};

// Items whose score may be among a query's best: bounds of their scores. The scan stops soon after count passes limit.
struct CurReservoir {
    float *upper, *lower;  // (limit + kCurBlock,)
    int32_t* ids;          // likewise
    int count, limit;
    float threshold;       // what an item's upper bound must reach
};

// A scan of one shard of packed items (ops/_cur.py says how they lie) by several queries. The score of item j is
// s_j * (q . v_j) with an error of at most s_j * (slack * norm_j + spread * residual_j + constant), s_j = 1 where there
// are no scales. Only int8 items have residuals.
constexpr int kCurTile = 16;
constexpr int kCurBlock = 80;  // items that a reservoir takes beyond its limit: four tiles, and a vector's rest
struct CurScan {
    Precision storage;
    const char* tiles;
    int64_t tile_bytes, count;
    int64_t apart;         // from a tile to the one scanned with it, or 0: a core reads two runs faster than one
    const char* then[2];   // the first pair of the scan after this one: fetched with the last
    const float* scale;    // (count,) or null
    int32_t first;         // id of the first item
    int width;             // values of an item as stored, padding included
    int queries;
    const void* q;         // (queries, ldq) int8 or float32, zero in the padding: int8 has rows for 32 queries and
    int64_t ldq;           // columns for 64 values, in whole multiples
    const int32_t* start;  // (queries,) -128 * the sum of q, int8 only
    const float *slack, *spread, *constant;  // (queries,)
    CurReservoir* reservoirs;  // (queries,)
};

struct Kernels {
    Isa isa;
    const char* name;
    int u8_max;  // largest stored activation: 255, or 127 where 8-bit products would saturate
    bool tiles;  // 8-bit and bfloat16 products run on tiles (AMX)

    Format (*input_format)(Precision);
    Format attention_format[3];  // by Precision
    size_t (*packed_bytes)(Precision, int n, int k);
    // w: (n, ldw) as stored. Fills data, scale and sum; returns false if a weight is not finite.
    bool (*pack)(Precision, const void* w, Source, int64_t ldw, int n, int k, char* data, float* scale, float* sum);

    void (*linear)(const Linear&);
    void (*attention)(const Attention&);
    size_t (*attention_scratch)(Format, int keys, int head_dim);
    void (*interval_attention)(const IntervalAttention&, const IntervalTask&);
    size_t (*interval_scratch)(int head_dim, int queries);
    void (*layer_norm)(const LayerNorm&);
    // Rows [begin, end); scratch: kLabelRows * padded(n) floats.
    void (*label_logits)(const LabelLogits&, int64_t begin, int64_t end, float* scratch);
    // y (rows, ldy), columns [0, n) in the format of x: the rows [begin, end) of x as label_logits norms them; of g
    // only x, n, norm, gamma, beta and eps are read. scratch: padded(n) floats.
    void (*norm_rows)(const LabelLogits& g, int64_t begin, int64_t end, void* y, int64_t ldy, float* scratch);
    void (*convert)(const float* x, int64_t ldx, int rows, int n, const Stored&);
    // Rotary embedding of (rows, heads * head_dim) float32, dimension i paired with i + half; cos and sin are (..,
    // half) by position; head_dim <= 512.
    void (*rope)(const float* x, int64_t ldx, const int32_t* positions, const float* cos, const float* sin, int rows,
                 int heads, int head_dim, int half, void* y, int64_t ldy, Format format);
    void (*embed)(const Embed&);
    // out[d] = mean over query tokens of the largest dot product with a token of document d (float32).
    void (*max_sim)(const char* packed_query, int query_tokens, int dim, const float* tokens, int64_t ld,
                    const int64_t* offsets, int documents, float* scratch, float* out);
    // Appends to the reservoirs from the tiles [begin, end), of which all but the last are full; returns the first tile
    // that was not scanned, because a reservoir is beyond its limit.
    int64_t (*cur_scan)(const CurScan&, int64_t begin, int64_t end);
    // q . v of one item of a tile, `values` with its padding; q has zeros up to a multiple of 8. The same bits
    // everywhere. next: where the values of an item begin that are fetched meanwhile.
    double (*cur_exact)(Precision, const char* tile, int lane, int64_t values, const double* q, const char* next);
    // The k-th largest of n values of which none is NaN, 1 <= k <= n; -0 counts as less than 0.
    float (*kth_largest)(const float* values, int n, int k);
    // Sustained operations for `iterations` rounds of register-only multiply-adds; returns the number of operations.
    double (*peak)(Precision, int64_t iterations);
    // The keys [key_begin, key_end); scratch: mass_scratch(head_dim, key_end - key_begin) bytes, 64-aligned. A key's
    // bits are the same whatever the bounds are.
    void (*attention_mass)(const AttentionMass&, int key_begin, int key_end, char* scratch);
    size_t (*mass_scratch)(int head_dim, int keys);
};

const Kernels* kernels(Isa isa);  // null where this build or this CPU lacks the level
Isa best_isa();  // the highest level this CPU runs
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* amx_kernels();

}  // namespace fastrerank::cpu
