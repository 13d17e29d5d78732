// A scan of int8 items for 32 queries at a time on integer tensor cores. A sample of the items gives each query a
// bound. Blocks then stream the tiles and keep the items that reach it, and the best of those are chosen.
#pragma once
#include "cur_topk/cuda_products.h"
#include "cur_topk/cuda_state.h"

namespace fastrerank::cuda {

constexpr int kMany = 32;  // queries of a scan
constexpr int kManySteps = 2;  // a warp takes two tiles in a step
constexpr int kManyBatch = kThreads * kManySteps;  // items of a block between two barriers
constexpr int kSpread = kMany / 16 * 32;  // 16-byte words of 32 values of all queries, as `spread` lays them out
constexpr int kPart = kThreads;  // items of a part of the sample: one step of a block

// Products of a warp's 32 items with 32 queries: [h][n][i] belongs to its item lane / 4 * 4 + h * 2 + i / 2 and query n
// * 8 + lane % 4 * 2 + i % 2.
using Products = int[2][kMany / 8][4];

// c += a b, 16 x 32 unsigned bytes by 32 x 8 signed ones. A lane holds rows lane / 4 and lane / 4 + 8 of a and column
// lane / 4 of b; in both it holds the groups lane % 4 and lane % 4 + 4 of four bytes.
__device__ __forceinline__ void multiply(const uint32_t (&a)[4], uint32_t low, uint32_t high, int (&c)[4]) {
#if defined(__CUDACC__)
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(low), "r"(high));
#else
    emulated::multiply(a, low, high, c);
#endif
}

// Products of 32 values of 32 items: two 16-byte words of a lane with the lane's words from `spread`.
__device__ __forceinline__ void add_values(const uint4& v, const uint4& w, const uint4* query, Products& sums) {
    const uint32_t rows[2][4] = {{v.x, v.y, w.x, w.y}, {v.z, v.w, w.z, w.w}};
    const uint4 own[2] = {query[0], query[32]};
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int n = 0; n < kMany / 8; n += 2) {
            multiply(rows[h], own[n / 2].x, own[n / 2].y, sums[h][n]);
            multiply(rows[h], own[n / 2].z, own[n / 2].w, sums[h][n + 1]);
        }
}

// The products of 32 items from `item` on, a multiple of 16, and the scales of the lane's four items. Beyond the last
// item the scale is NaN, so that no score reaches a bound. Sixteen bytes of a tile are four values of four items each;
// `multiply` takes them as rows lane / 4 and lane / 4 + 8 of two matrices. A warp reads 256 bytes of each of two tiles
// at a time; beyond the last tile or value it reads existing ones, which do not count. query: as `spread` lays it out.
__device__ __forceinline__ void products_of(const CurTopk& g, int64_t item, const uint4* query, const int* shift,
                                            int lane, float (&scale)[4], Products& sums) {
    constexpr int kLoads = 8;
    const int64_t tile = min(item / kTile + lane / 16, (g.count - 1) / kTile), own = item + lane / 4 * 4;
    const uint4* p = reinterpret_cast<const uint4*>(g.tiles + tile * g.tile_bytes) + lane / 4 % 4 + lane % 4 * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) scale[j] = own + j >= g.count ? NAN : g.scale ? __ldg(g.scale + own + j) : 1;
#pragma unroll
    for (int n = 0; n < kMany / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[0][n][i] = sums[1][n][i] = -shift[n * 8 + lane % 4 * 2 + i % 2];
    const int groups = g.stored_width / 4;
    int at = 0;
#pragma unroll 1
    for (; at + 4 * kLoads <= groups; at += 4 * kLoads) {
        uint4 v[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) v[i] = __ldcs(p + 16 * i);
        p += 16 * kLoads;
#pragma unroll
        for (int i = 0; i < kLoads; i += 2) add_values(v[i], v[i + 1], query + (at / 8 + i / 2) * kSpread + lane, sums);
    }
#pragma unroll 1
    for (; at < groups; at += 8) {
        const int left = groups - 1 - at - lane % 4;
        const uint4 low = __ldcs(p + min(left, 0) * 4), high = __ldcs(p + min(left, 4) * 4);
        p += 32;
        add_values(low, high, query + at / 8 * kSpread + lane, sums);
    }
}

// Lays out the rounded queries of `live` rows for `products_of`: for each 32 values and 16 queries, the words that each
// lane needs for two matrices. Queries after the last are zeros.
__device__ __forceinline__ void spread(const CurTopk& g, const Scratch& s, int first_row, int live, uint32_t* query,
                                       int* shift) {
    const int words = words_of(g), thread = static_cast<int>(threadIdx.x);
#pragma unroll 8
    for (int i = thread; i < words * kMany; i += kThreads) {
        const int part = i % 4, lane = i / 4 % 32, pair = i / 128 % (kMany / 16), step = i / (8 * kMany);
        const int q = (pair * 2 + part / 2) * 8 + lane / 4, word = step * 8 + part % 2 * 4 + lane % 4;
        query[i] = q < live ? s.rounded[static_cast<int64_t>(first_row + q) * words + word] : 0;
    }
    if (thread < kMany) shift[thread] = thread < live ? s.states[first_row + thread].shift : 0;
}

// One block for each part of the sample, and the parts are spread over all items: finds the part's best item for each
// query.
__global__ void __launch_bounds__(kThreads, 2) sample_kernel(CurTopk g, Scratch s, int first_row) {
    extern __shared__ uint4 memory[];
    __shared__ int shift[kMany];
    __shared__ Entry tops[kWarps][kMany];
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int parts = static_cast<int>(gridDim.x), part = static_cast<int>(blockIdx.x);
    const int live = min(kMany, g.rows - first_row);
    spread(g, s, first_row, live, reinterpret_cast<uint32_t*>(memory), shift);
    __syncthreads();
    const int64_t item = g.count / parts * part / 32 * 32 + warp * 32;
    float scale[4];
    Products sums;
    products_of(g, item, memory, shift, lane, scale, sums);
#pragma unroll
    for (int n = 0; n < kMany / 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            Entry top = kNoEntry;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int64_t own = item + lane / 4 * 4 + j;
                const float score = static_cast<float>(sums[j / 2][n][j % 2 * 2 + c]) * scale[j];
                if (own < g.count) top = max(top, entry_of(score, static_cast<int32_t>(own)));
            }
#pragma unroll
            for (int apart = 16; apart >= 4; apart /= 2) {
                const Entry other = __shfl_xor_sync(kAll, static_cast<unsigned long long>(top), apart);
                top = max(top, other);
            }
            if (lane < 4) tops[warp][n * 8 + lane * 2 + c] = top;
        }
    __syncthreads();
    if (thread >= live) return;
    Entry top = kNoEntry;
    for (int i = 0; i < kWarps; ++i) top = max(top, tops[i][thread]);
    s.tops[static_cast<int64_t>(thread) * parts + part] = top;
}

// Blocks scan for up to 32 queries. Items that reach the last of the `wanted` best of the sample go into a reservoir,
// and the reservoir's rest at the end goes into the query's list.
__global__ void __launch_bounds__(kThreads, 2) many_kernel(CurTopk g, Scratch s, int first_row) {
    extern __shared__ uint4 memory[];
    __shared__ int shift[kMany], count[kMany], place[kMany];
    __shared__ Entry least[kMany];
    __shared__ float bar[kMany];  // the score of `least`; for rows after the last query, above every score
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int size = reservoir_size(g.wanted, kManyBatch), live = min(kMany, g.rows - first_row);
    Entry* stage = reinterpret_cast<Entry*>(memory + words_of(g) * kMany / 4);
    Entry* reservoirs = s.reservoirs + static_cast<int64_t>(blockIdx.x) * kMany * size;
    spread(g, s, first_row, live, reinterpret_cast<uint32_t*>(memory), shift);
    if (thread < kMany) {
        const int64_t last = static_cast<int64_t>(first_row + thread + 1) * g.wanted - 1;
        const Entry known = thread < live ? s.found[last] : kNoEntry;
        count[thread] = 0, least[thread] = known;
        bar[thread] = thread >= live ? INFINITY : known == kNoEntry ? -INFINITY : score_of(known);
    }
    __syncthreads();

    // Cuts reservoirs that hold more than `most` entries back to the `wanted` best.
    const auto cut = [&](int most) {
        for (int q = 0; q < live; ++q) {
            const int filled = count[q];
            if (filled <= most) continue;
            Entry* own = reservoirs + q * size;
            for (int i = thread; i < filled; i += kThreads) stage[i] = own[i];
            cut_back(stage, power_of_two(filled), filled, thread, kThreads, BlockBarrier());
            for (int i = thread; i < g.wanted; i += kThreads) own[i] = stage[i];
            if (thread == 0) count[q] = g.wanted, least[q] = stage[g.wanted - 1], bar[q] = score_of(least[q]);
            __syncthreads();
        }
    };
    bool full = false;
    const auto append = [&](int q, float score, int64_t item) {
        const Entry e = entry_of(score, static_cast<int32_t>(item));
        if (e < least[q]) return;
        const int at = atomicAdd(&count[q], 1);
        reservoirs[q * size + at] = e;
        full |= at >= size - kManyBatch;
    };
    const int64_t batches = (g.count + kManyBatch - 1) / kManyBatch;
    for (int64_t batch = blockIdx.x; batch < batches; batch += gridDim.x) {
#pragma unroll 1
        for (int step = 0; step < kManySteps; ++step) {
            const int64_t item = batch * kManyBatch + (warp * kManySteps + step) * 32;
            float scale[4];
            Products sums;
            products_of(g, item, memory, shift, lane, scale, sums);
#pragma unroll
            for (int n = 0; n < kMany / 8; ++n)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int q = n * 8 + lane % 4 * 2 + c;
                    float score[4], best = -INFINITY;
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        score[j] = static_cast<float>(sums[j / 2][n][j % 2 * 2 + c]) * scale[j];
                        best = fmaxf(best, score[j]);
                    }
                    if (best < bar[q]) continue;
#pragma unroll 1
                    for (int j = 0; j < 4; ++j) {
                        if (score[0] >= bar[q]) append(q, score[0], item + lane / 4 * 4 + j);
                        score[0] = score[1], score[1] = score[2], score[2] = score[3];
                    }
                }
        }
        if (!__syncthreads_or(full)) continue;
        cut(size - kManyBatch);
        full = false;
        __syncthreads();
    }
    cut(g.wanted);
    if (thread < live)
        place[thread] = static_cast<int>(atomicAdd(&s.states[first_row + thread].published, 0u + count[thread]));
    __syncthreads();
    for (int q = warp; q < live; q += kWarps) {
        Entry* list = s.lists + static_cast<int64_t>(q) * gridDim.x * g.wanted + place[q];
        for (int i = lane; i < count[q]; i += 32) list[i] = reservoirs[q * size + i];
    }
}

// One block for each query: the best of its entries, descending. Each query has `room` entries, or, if `listed`, as
// many as are published.
__global__ void __launch_bounds__(kSortThreads)
    choose_kernel(CurTopk g, Scratch s, int first_row, const Entry* entries, int room, bool listed) {
    extern __shared__ Entry shared[];
    __shared__ int filled;
    __shared__ Entry last;
    const int thread = static_cast<int>(threadIdx.x), size = reservoir_size(g.wanted, kSortThreads);
    const int64_t row = first_row + static_cast<int64_t>(blockIdx.x);
    const int n = listed ? static_cast<int>(s.states[row].published) : room;
    const Entry* own = entries + static_cast<int64_t>(blockIdx.x) * room;
    if (thread == 0) filled = 0, last = kNoEntry;
    __syncthreads();
    for (int begin = thread; begin - thread < n; begin += kSortThreads * 4) {
        Entry four[4];  // loaded together, to wait for memory once
#pragma unroll
        for (int j = 0; j < 4; ++j) four[j] = begin + j * kSortThreads < n ? own[begin + j * kSortThreads] : kNoEntry;
#pragma unroll 1
        for (int j = 0; j < 4; ++j) {
            bool full = false;
            if (four[0] > last) {
                const int at = atomicAdd(&filled, 1);
                shared[at] = four[0];
                full = at >= size - kSortThreads;
            }
            four[0] = four[1], four[1] = four[2], four[2] = four[3];
            if (!__syncthreads_or(full)) continue;
            const int now = filled;
            cut_back(shared, size, now, thread, kSortThreads, BlockBarrier());
            if (thread == 0) filled = min(now, g.wanted), last = shared[g.wanted - 1];
            __syncthreads();
        }
    }
    const int now = filled;
    cut_back(shared, power_of_two(max(now, g.wanted)), now, thread, kSortThreads, BlockBarrier());
    Entry* found = s.found + row * g.wanted;
    for (int i = thread; i < g.wanted; i += kSortThreads) found[i] = shared[i];
}

}  // namespace fastrerank::cuda
