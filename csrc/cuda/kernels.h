// The CUDA kernels' interface: device pointers, sizes and a stream as plain values; no Python, no torch. Launchers are
// asynchronous on `stream`, allocate nothing and return the launch's error.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastrerank::cuda {

// words[i] = i.
cudaError_t fill(uint32_t* words, int64_t n, cudaStream_t stream);

// sums[b] = sum modulo 2^32 of the words that block b read; their sum is that of words[0 .. n). n is a multiple of 4,
// words is 16-byte aligned.
constexpr int kReadBlocks = 4096;
cudaError_t read(const uint32_t* words, int64_t n, uint32_t* sums, cudaStream_t stream);

// The k best of each query's scores with packed items, exactly: by score descending, then by id ascending. A scan of
// products of a rounded query, of which it keeps the `wanted` best, and float64 scores of these. The scan's products
// are, for int8, the integer sum times the item's scale in float32; for bfloat16 float32 sums in one fixed order.
constexpr int kCurMostWanted = 2112;
struct CurTopk {
    bool int8;             // else bfloat16
    const char* tiles;     // as ops/_cur.py lays them out, 16-byte aligned
    int64_t tile_bytes, count;
    const float* scale;    // (count,) of items, or null; int8 only
    const float* anchors;  // (width,) scales of anchors, or null; int8 only
    int32_t first;         // id of the first item
    int width;             // values of an item and of a query
    int stored_width;      // the same with padding: a multiple of 4 (int8) or 16 (bfloat16)
    double reach;          // no item's norm is larger, its scale multiplied in
    const float* queries;  // (rows, width)
    int rows, k, wanted;   // 1 <= k <= wanted <= kCurMostWanted
    int blocks;            // of the scan, at most
    char* scratch;         // cur_topk_scratch(g) bytes, 16-byte aligned
    int64_t* ids;          // (rows, k), -1 where there are fewer items
    float* scores;         // (rows, k), -infinity where there are fewer items
    int32_t* status;       // (rows,) of CurStatus
};
// What became of a row. kCurUncertain: rounding may hide an item that was not among the wanted.
enum CurStatus { kCurExact = 0, kCurUncertain = 1, kCurNan = 2, kCurQueryNotFinite = 3 };
int64_t cur_topk_scratch(const CurTopk& g);
cudaError_t cur_topk(const CurTopk& g, cudaStream_t stream);

// Whether this build holds machine code, or PTX to compile, for the current device.
bool has_code();

}  // namespace fastrerank::cuda
