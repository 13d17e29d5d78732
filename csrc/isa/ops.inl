// The ops that every level implements. This file is included three times, and an op has a line in each part that
// concerns it: the headers that declare its arguments, its kernels, and the code that implements them.
//
// A KERNEL is a name, a result type and arguments. `Kernels` gets a member for each, and each level's table sets
// that member to the level's function of the same name: a level without the function does not compile.

#if defined(FASTRERANK_INTERFACES)

#include "attention/attention.h"
#include "attention_mass/attention_mass.h"
#include "cur_topk/cur_scan.h"
#include "encoder/self_attention.h"
#include "label_logits/label_logits.h"
#include "linear/linear.h"
#include "norm_rows/norm_rows.h"
#include "rows/rows.h"

#elif defined(KERNEL)

// The format in which a product of this precision reads its inputs.
KERNEL(input_format, Format, (Precision))
KERNEL(packed_bytes, size_t, (Precision, int n, int k))
// w: (n, ldw) as stored. Fills data, scale and sum; returns false if a weight is not finite.
KERNEL(pack, bool, (Precision, const void* w, Source, int64_t ldw, int n, int k, char* data, float* scale, float* sum))
KERNEL(linear, void, (const Linear&))

KERNEL(layer_norm, void, (const LayerNorm&))
KERNEL(convert, void, (const float* x, int64_t ldx, int rows, int n, const Stored&))
// Rotary embedding of (rows, heads * head_dim) float32. Dimension i is paired with i + half. cos and sin are (..,
// half) by position. head_dim is at most 512.
KERNEL(rope, void,
       (const float* x, int64_t ldx, const int32_t* positions, const float* cos, const float* sin, int rows, int heads,
        int head_dim, int half, void* y, int64_t ldy, Format format))
KERNEL(embed, void, (const Embed&))
KERNEL(self_attention, void, (const SelfAttention&))
KERNEL(self_attention_scratch, size_t, (Format, int keys, int head_dim))

KERNEL(attention, void, (const Attention&, const AttentionTask&))
KERNEL(attention_scratch, size_t, (int head_dim, int queries))

// The keys [key_begin, key_end); scratch: attention_mass_scratch(head_dim, key_end - key_begin) bytes, 64-aligned. A
// key's bits do not depend on the bounds.
KERNEL(attention_mass, void, (const AttentionMass&, int key_begin, int key_end, char* scratch))
KERNEL(attention_mass_scratch, size_t, (int head_dim, int keys))

// y (rows, ldy), columns [0, n) in the format of x: the rows [begin, end) of x, normed. scratch: padded(n) floats.
KERNEL(norm_rows, void, (const NormRows&, int64_t begin, int64_t end, void* y, int64_t ldy, float* scratch))
// The rows [begin, end); scratch: kLabelRows * padded(n) floats.
KERNEL(label_logits, void, (const LabelLogits&, int64_t begin, int64_t end, float* scratch))

// out[d] = mean over query tokens of the largest dot product with a token of document d (float32). scratch:
// padded(query_tokens) floats.
KERNEL(max_sim, void,
       (const char* packed_query, int query_tokens, int dim, const float* tokens, int64_t ld, const int64_t* offsets,
        int documents, float* scratch, float* out))

// Appends items of the tiles [begin, end) to the reservoirs; all tiles but the last are full. Returns the first tile
// that was not scanned because a reservoir is beyond its limit.
KERNEL(cur_scan, int64_t, (const CurScan&, int64_t begin, int64_t end))
// q . v of one item of a tile, `values` with its padding; q has zeros up to a multiple of 8. All levels return the
// same bits. next: where the values begin of an item that is fetched meanwhile.
KERNEL(cur_exact, double, (Precision, const char* tile, int lane, int64_t values, const double* q, const char* next))
// The k-th largest of n values, none of them NaN, 1 <= k <= n; -0 counts as less than 0.
KERNEL(kth_largest, float, (const float* values, int n, int k))

// Runs `iterations` rounds of multiply-adds in registers; returns the number of operations.
KERNEL(peak, double, (Precision, int64_t iterations))

#else

// An op's code may use that of the ops above it.
#include "linear/linear.inl"
#include "rows/rows.inl"
#include "attention/panels.inl"
#include "encoder/self_attention.inl"
#include "attention/attention.inl"
#include "norm_rows/norm_rows.inl"
#include "label_logits/label_logits.inl"
#include "attention_mass/attention_mass.inl"
#include "max_sim/max_sim.inl"
#include "cur_topk/cur_topk.inl"
#include "peak/peak.inl"

#endif
