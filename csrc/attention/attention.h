// ops.attention: attention by key intervals over packed rows.
#pragma once
#include "isa/types.h"

namespace fastrerank::cpu {

// Row i of T sees the keys [lo[i], hi[i]) of up to two lists of intervals, which do not overlap. Query head h reads
// key head h / group. A row without keys gets zeros, and -infinity as its log-sum-exp.
struct Attention {
    const char *q, *k, *v;
    char* out;
    float* lse;                                                              // (T, heads) log-sum-exp, or null
    int64_t q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head;  // strides in elements
    Format format;                 // of q, k, v and out: kF32 or kBF16
    int heads, group, head_dim;    // head_dim is a multiple of 8, at most 256
    float scale;                   // positive
    float softcap;                 // scores become softcap * tanh(score / softcap); 0: no cap
    const int32_t *lo[2], *hi[2];  // (T,) each; a list may be null
};

// Consecutive rows whose intervals of one list are not empty, and of which both ends stay or advance by one key from
// row to row. Blocks of keys are counted from key_begin, the first key of the run's first row.
//
// A run of the second list may be joined with a prefix. Its rows all begin at key_begin and all see one and the same
// interval of the first list; that interval is placed before their own keys, as if both were one interval. A row then
// has the bits that it would have with an unshared prefix. The first list has no run for such rows.
struct KeyRun {
    int row_begin, row_end, key_begin;
    int prefix_begin, prefix_keys;  // prefix_keys is 0 where there is no such prefix

    bool joined() const { return prefix_keys > 0; }
    int key(int position) const {  // the key at a position of a joined run, counted from its prefix's first key
        return position < prefix_keys ? prefix_begin + position : key_begin + position - prefix_keys;
    }
};

// The rows [row_begin, row_end) for the queries of one key head. runs[list] is the first run of the list that reaches
// into the rows; runs_end[list] is the end of the list.
struct AttentionTask {
    int kv_head, row_begin, row_end;
    const KeyRun *runs[2], *runs_end[2];
    char* scratch;  // attention_scratch(head_dim, (row_end - row_begin) * group) bytes, 64-aligned
};

// Cuts the rows into tasks and runs them. Throws std::invalid_argument where an interval leaves [0, keys) or a row's
// two intervals overlap. The result does not depend on `threads`.
void run_attention(const Kernels& k, const Attention& g, int rows, int keys, int threads);

// Throws std::invalid_argument, with the arrays' names, unless 0 <= lo[i] <= hi[i] <= keys for all rows.
void check_intervals(const char* lo_name, const char* hi_name, const int32_t* lo, const int32_t* hi, int rows,
                     int keys);

}  // namespace fastrerank::cpu
