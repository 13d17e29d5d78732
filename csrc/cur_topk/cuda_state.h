// The state of a call's queries, and the scratch of its kernels.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cur_topk/cuda_topk.h"
#include "cur_topk/reservoir.h"

namespace fastrerank::cuda {

constexpr int kThreads = 256;
constexpr int kSortThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kPadding = 64;  // words of a query are a multiple of what a warp reads of a tile at a time

// The state of a query during a scan.
struct alignas(32) State {
    Entry floor;         // the least of the published entries
    uint32_t published;  // number of published entries, each the best of other items; or of entries in the query's list
    int32_t shift;  // 128 times the sum of the rounded query's values, int8 only
    double unit, error;  // a score is within `error` of `unit` times the product
};

struct Scratch {
    int32_t* status;  // (rows,)
    State* states;  // (rows,)
    uint32_t* rounded;  // (rows, words of a query)
    Entry* lists;  // (queries of a launch, blocks, wanted)
    Entry* found;  // (rows, wanted), products, descending
    Entry* exact;  // (rows, wanted)
    Entry* tops;  // (kMany, parts of the sample); only scans for many queries have it and the next
    Entry* reservoirs;  // (blocks, kMany, reservoir_size(wanted, kManyBatch))
};

struct BlockBarrier {
    __device__ __forceinline__ void operator()() const { __syncthreads(); }
};

__device__ __forceinline__ int words_of(const CurTopk& g) {
    return ((g.int8 ? g.stored_width / 4 : g.stored_width) + kPadding - 1) / kPadding * kPadding;
}

}  // namespace fastrerank::cuda
