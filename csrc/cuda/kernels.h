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

// The k best of one query's products with packed items, k <= kCurMostK: by product descending, then by id ascending.
// int8: the product is the integer sum times the item's scale, in float32. bfloat16: float32 sums in one fixed order.
constexpr int kCurMostK = 2112;
struct CurScan {
    bool int8;            // else bfloat16
    const char* tiles;    // as ops/_cur.py lays them out, 16-byte aligned
    int64_t tile_bytes, count;
    const float* scale;   // (count,) or null, int8 only
    int32_t first;        // id of the first item
    int stored_width;     // values of an item, padding included
    const void* query;    // (stored_width,) int8 or float32, zero in the padding; 4-byte aligned
    int k;
};
// Bytes of shared memory that a block takes: a reservoir and the query.
size_t cur_scan_shared(const CurScan& g);
// best: (blocks, k) of scratch. ids, scores: (k,), -1 and -infinity where there are fewer items.
cudaError_t cur_scan(const CurScan& g, uint64_t* best, int blocks, int32_t* ids, float* scores, cudaStream_t stream);

// Whether this build holds machine code, or PTX to compile, for the current device.
bool has_code();

}  // namespace fastrerank::cuda
