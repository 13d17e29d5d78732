// What the kernels of a search know of a call, and their scratch.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cur_topk/cuda_topk.h"
#include "cur_topk/reservoir.h"

namespace fastrerank::cuda {

constexpr int kThreads = 256;
constexpr int kSortThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kPadding = 64;  // words of a query: what a warp reads of a tile at a time

// What a scan knows of a query.
struct alignas(32) State {
    Entry floor;         // the least of the published entries
    uint32_t published;  // how many entries are published, each the best of other items; or are in the query's list
    int32_t shift;       // 128 times the sum of the rounded query's values, int8 only
    double unit, error;  // a score is within `error` of `unit` times the product
};

struct Scratch {
    int32_t* status;    // (rows,)
    State* states;      // (rows,)
    uint32_t* rounded;  // (rows, words of a query)
    Entry* lists;       // (queries of a launch, blocks, wanted)
    Entry* found;       // (rows, wanted), products, descending
    Entry* exact;       // (rows, wanted)
    Entry* tops;        // (kMany, parts of the sample), of scans for many queries, as is the next
    Entry* reservoirs;  // (blocks, kMany, reservoir_size(wanted, kManyBatch))
};

struct BlockBarrier {
    __device__ __forceinline__ void operator()() const { __syncthreads(); }
};

__device__ __forceinline__ int words_of(const CurTopk& g) {
    return ((g.int8 ? g.stored_width / 4 : g.stored_width) + kPadding - 1) / kPadding * kPadding;
}

}  // namespace fastrerank::cuda
