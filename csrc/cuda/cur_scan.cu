// Top-k of products of one query with packed items, on int8 and bfloat16 tiles (ops/_cur.py): a block streams its
// share of the tiles with 16-byte loads and keeps a reservoir in shared memory; a second kernel merges the blocks'
// bests. Every sum has one order and the order of entries is total, so results do not depend on timing.
#include "kernels.h"
#include "reservoir.h"

namespace fastrerank::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMergeThreads = 512;
constexpr int kTile = 16;

struct BlockBarrier {
    __device__ __forceinline__ void operator()() const { __syncthreads(); }
};

// Products of 64 bytes: 16 bytes of a tile's row of groups, four items' four values, with the query's four.
__device__ __forceinline__ void add_int8(const uint4 v, uint32_t q, int (&sum)[4]) {
    // Stored values are value + 128; flipping the top bit makes them signed.
    sum[0] = __dp4a(static_cast<int>(v.x ^ 0x80808080u), static_cast<int>(q), sum[0]);
    sum[1] = __dp4a(static_cast<int>(v.y ^ 0x80808080u), static_cast<int>(q), sum[1]);
    sum[2] = __dp4a(static_cast<int>(v.z ^ 0x80808080u), static_cast<int>(q), sum[2]);
    sum[3] = __dp4a(static_cast<int>(v.w ^ 0x80808080u), static_cast<int>(q), sum[3]);
}

__device__ __forceinline__ float2 of_bf16(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// Four neighbouring threads take the 16 items of an int8 tile, four items each; a thread takes one bfloat16 item.
template <bool Int8>
__global__ void __launch_bounds__(kThreads, 4) scan_kernel(CurScan g, Entry* best) {
    extern __shared__ Entry shared[];
    __shared__ int count;
    __shared__ Entry threshold;
    constexpr int kItems = Int8 ? 4 : 1;
    constexpr int kBatch = kThreads * kItems;
    const int size = reservoir_size(g.k, kBatch);
    uint32_t* query = reinterpret_cast<uint32_t*>(shared + size);
    const int words = Int8 ? g.stored_width / 4 : g.stored_width;
    for (int i = threadIdx.x; i < words; i += kThreads) query[i] = static_cast<const uint32_t*>(g.query)[i];
    if (threadIdx.x == 0) count = 0, threshold = kNoEntry;
    __syncthreads();

    const int64_t batches = (g.count + kBatch - 1) / kBatch;
    for (int64_t batch = blockIdx.x; batch < batches; batch += gridDim.x) {
        const int64_t first = batch * kBatch + static_cast<int64_t>(threadIdx.x) * kItems;
        float scores[kItems];
        if (first < g.count) {
            const char* tile = g.tiles + first / kTile * g.tile_bytes;
            if constexpr (Int8) {
                int sum[4] = {0, 0, 0, 0};
                const uint4* p = reinterpret_cast<const uint4*>(tile) + first % kTile / 4;
#pragma unroll 8
                for (int i = 0; i < words; ++i) add_int8(__ldcs(p + i * 4), query[i], sum);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float scale = g.scale && first + j < g.count ? __ldg(g.scale + first + j) : 1.0f;
                    scores[j] = static_cast<float>(sum[j]) * scale;
                }
            } else {
                const float* q = reinterpret_cast<const float*>(query);
                const uint4* p = reinterpret_cast<const uint4*>(tile + first % kTile * g.stored_width * 2);
                float even = 0, odd = 0;
#pragma unroll 2
                for (int i = 0; i < words / 8; ++i) {
                    const uint4 v = __ldcs(p + i);
                    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float2 x = of_bf16(pairs[j]);
                        even = fmaf(x.x, q[i * 8 + j * 2], even);
                        odd = fmaf(x.y, q[i * 8 + j * 2 + 1], odd);
                    }
                }
                scores[0] = even + odd;
            }
        }
        // There is room for a whole batch: the reservoir is cut back below.
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
            if (first + j >= g.count) continue;
            const Entry e = entry_of(scores[j], g.first + static_cast<int32_t>(first + j));
            if (e > threshold) shared[atomicAdd(&count, 1)] = e;
        }
        __syncthreads();
        const int filled = count;
        __syncthreads();
        if (filled + kBatch > size) {
            cut_back(shared, size, filled, threadIdx.x, kThreads, BlockBarrier());
            if (threadIdx.x == 0) count = min(filled, g.k), threshold = filled >= g.k ? shared[g.k - 1] : kNoEntry;
            __syncthreads();
        }
    }
    __syncthreads();
    cut_back(shared, size, count, threadIdx.x, kThreads, BlockBarrier());
    for (int i = threadIdx.x; i < g.k; i += kThreads) best[static_cast<int64_t>(blockIdx.x) * g.k + i] = shared[i];
}

struct BlockLanes {
    int lane, count;
    __device__ __forceinline__ void barrier() const { __syncthreads(); }
    __device__ __forceinline__ int add(int* n) const { return atomicAdd(n, 1); }
    __device__ __forceinline__ bool any(bool x) const { return __syncthreads_or(x); }
};

// One block: the k best of the blocks' bests.
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const Entry* best, int blocks, int k, int32_t* ids, float* scores) {
    extern __shared__ Entry shared[];
    __shared__ int filled;
    __shared__ Entry threshold;
    if (threadIdx.x == 0) filled = 0, threshold = kNoEntry;
    __syncthreads();
    merge_lists(best, blocks, k, shared, reservoir_size(k, kMergeThreads), &filled, &threshold,
                BlockLanes{static_cast<int>(threadIdx.x), kMergeThreads});
    for (int i = threadIdx.x; i < k; i += kMergeThreads) {
        const bool there = shared[i] != kNoEntry;
        ids[i] = there ? id_of(shared[i]) : -1;
        scores[i] = there ? score_of(shared[i]) : -INFINITY;
    }
}

}  // namespace

size_t cur_scan_shared(const CurScan& g) {
    const int batch = kThreads * (g.int8 ? 4 : 1);
    return reservoir_size(g.k, batch) * sizeof(Entry) + (g.int8 ? g.stored_width : g.stored_width * 4);
}

cudaError_t cur_scan(const CurScan& g, uint64_t* best, int blocks, int32_t* ids, float* scores, cudaStream_t stream) {
    const size_t shared = cur_scan_shared(g);
    const auto kernel = g.int8 ? scan_kernel<true> : scan_kernel<false>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
    kernel<<<blocks, kThreads, shared, stream>>>(g, best);
    const cudaError_t launched = cudaGetLastError();
    if (launched != cudaSuccess) return launched;
    merge_kernel<<<1, kMergeThreads, reservoir_size(g.k, kMergeThreads) * sizeof(Entry), stream>>>(best, blocks, g.k,
                                                                                                   ids, scores);
    return cudaGetLastError();
}

}  // namespace fastrerank::cuda
