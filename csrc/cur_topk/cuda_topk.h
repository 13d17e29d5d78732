// ops.cur_topk on CUDA devices. Device pointers, sizes and a stream are plain values; no Python, no torch. The launcher
// is asynchronous on `stream`, allocates nothing and returns the launch's error.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastrerank::cuda {

// The k best of B queries' exact scores with packed items; ops/_cur_topk/items.py describes the layout of items. The
// scan reads rounded queries; the `wanted` best of its products get exact scores, summed in float64, and the best of
// those are the result. It is right where the status is 0: then no other item can reach the k-th.
constexpr int kCurMostK = 2112;
struct CurTopk {
    bool int8;  // else bfloat16
    const char* tiles;  // 16-byte aligned
    int64_t tile_bytes, count;
    const float* scale;  // (count,) or null: of items, int8 only
    const float* anchor;  // (width,) or null: of anchors, int8 only
    int width;  // values of an item
    int stored_width;  // padding included
    double reach;  // the largest norm of an item, times its scale
    const float* queries;  // (rows, width)
    int rows;
    int k, wanted;  // 1 <= k <= wanted <= kCurMostK
    int processors;  // multiprocessors of the device
};
// Bits of a query's status.
constexpr int32_t kCurUncertain = 1, kCurNan = 2,
                  kCurNotFinite = 4;  // a better item may be missing; a score is NaN; the query is not finite

// Bytes of scratch, which must be 256-aligned. Its first words are the statuses (rows,); it is in use until they are
// written.
size_t cur_scratch(const CurTopk& g);
// ids, scores: (rows, k), -1 and -infinity where there are fewer items. It sets the kernels' limits of shared memory,
// so callers must not call it for one device from several threads at once.
cudaError_t cur_topk(const CurTopk& g, void* scratch, int64_t* ids, float* scores, cudaStream_t stream);

}  // namespace fastrerank::cuda
