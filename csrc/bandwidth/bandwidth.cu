// Bandwidth of a kernel that only reads: no scan of an index can be faster.
#include "bandwidth/bandwidth.h"

namespace fastrerank::cuda {
namespace {

constexpr int kThreads = 256;
// 16-byte loads in flight per thread: 4096 blocks of 256 threads ask for 64 MiB at a time, far beyond
// bandwidth x latency of any device.
constexpr int kLoads = 4;

__global__ void fill_kernel(uint32_t* words, int64_t n) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step)
        words[i] = static_cast<uint32_t>(i);
}

__device__ __forceinline__ uint32_t sum_of(uint4 v) { return v.x + v.y + v.z + v.w; }

__global__ void __launch_bounds__(kThreads) read_kernel(const uint4* words, int64_t n, uint32_t* sums) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    uint32_t sum = 0;
    for (; i + (kLoads - 1) * step < n; i += kLoads * step) {
        uint4 v[kLoads];
#pragma unroll
        for (int j = 0; j < kLoads; ++j) v[j] = __ldcs(words + i + j * step);
#pragma unroll
        for (int j = 0; j < kLoads; ++j) sum += sum_of(v[j]);
    }
    for (; i < n; i += step) sum += sum_of(__ldcs(words + i));

    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(0xffffffffu, sum, lanes);
    __shared__ uint32_t warp[kThreads / 32];
    if (threadIdx.x % 32 == 0) warp[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t total = 0;
        for (const uint32_t w : warp) total += w;
        sums[blockIdx.x] = total;
    }
}

}  // namespace

cudaError_t fill(uint32_t* words, int64_t n, cudaStream_t stream) {
    fill_kernel<<<kReadBlocks, kThreads, 0, stream>>>(words, n);
    return cudaGetLastError();
}

cudaError_t read(const uint32_t* words, int64_t n, uint32_t* sums, cudaStream_t stream) {
    read_kernel<<<kReadBlocks, kThreads, 0, stream>>>(reinterpret_cast<const uint4*>(words), n / 4, sums);
    return cudaGetLastError();
}

bool has_code() {
    cudaFuncAttributes attributes;
    const bool found = cudaFuncGetAttributes(&attributes, read_kernel) == cudaSuccess;
    cudaGetLastError();  // a missing image is an answer here; the next call must not report it as an error
    return found;
}

}  // namespace fastrerank::cuda
