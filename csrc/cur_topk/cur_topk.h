// Exact top-k of products with packed items: a scan with bounds, and exact scores of what the bounds leave.
#pragma once
#include <vector>

#include "isa/types.h"

namespace fastrerank::cpu {

struct CurShard {
    const char* tiles;   // as ops/_cur_topk/items.py describes them
    const float* scale;  // (count,) or null
    const char* exact;   // tiles of CurTopk::exact_storage
    int64_t count;
};

struct CurTopk {
    Precision storage, exact_storage;  // of the scanned tiles and of the exact ones, which may be the same
    bool rounded;                      // the scanned tiles are the exact ones, rounded to multiples of their scale
    int width;                         // values of an item
    const float* anchor_scale;         // (width,) or null: multiplies the queries for the scanned tiles
    std::vector<CurShard> shards;      // ids continue from one to the next, below 2^31
    const float* queries;              // (rows, width)
    int64_t rows, k;                   // k: columns of the results
    const int64_t *left_out, *left_out_begin;  // ascending ids; those of row r in [begin[r], begin[r + 1])
    int64_t* ids;                      // (rows, k), -1 where there are no more
    float* scores;                     // (rows, k), -infinity there
};

struct CurFault {
    enum Kind { kNone = 0, kNaN = 1, kOtherItems = 2, kQuery = 3 } kind = kNone;
    int64_t row = 0, item = 0;  // of kQuery: the value
};

// Results do not depend on `threads` or on the level. A fault leaves them undefined.
CurFault run_cur_topk(const Kernels& k, const CurTopk& g, int threads);

}  // namespace fastrerank::cpu
