// Products of a tile of 16 packed items with rounded queries, by a warp.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastrerank::cuda {

constexpr int kTile = 16;
constexpr unsigned kAll = 0xffffffffu;

// sum plus four products of unsigned with signed bytes.
__device__ __forceinline__ int dot4(uint32_t values, uint32_t query, int sum) {
#if defined(__CUDA_ARCH__)
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(values), "r"(query), "r"(sum));
#else
    for (int shift = 0; shift < 32; shift += 8)
        sum += static_cast<uint8_t>(values >> shift) * static_cast<int8_t>(query >> shift);
#endif
    return sum;
}

// Products of sixteen bytes: four values of four items each.
template <int Q, int Tile>
__device__ __forceinline__ void add_values(const uint4 v, const uint32_t* query, int group, int (&sums)[Q][8]) {
    uint32_t own[Q];
    if constexpr (Q == 4) {
        const uint4 four = reinterpret_cast<const uint4*>(query)[group];
        own[0] = four.x, own[1] = four.y, own[2] = four.z, own[3] = four.w;
    } else {
        own[0] = query[group];
    }
#pragma unroll
    for (int q = 0; q < Q; ++q) {
        sums[q][Tile * 4] = dot4(v.x, own[q], sums[q][Tile * 4]);
        sums[q][Tile * 4 + 1] = dot4(v.y, own[q], sums[q][Tile * 4 + 1]);
        sums[q][Tile * 4 + 2] = dot4(v.z, own[q], sums[q][Tile * 4 + 2]);
        sums[q][Tile * 4 + 3] = dot4(v.w, own[q], sums[q][Tile * 4 + 3]);
    }
}

// A tile of int8 items. A lane reads four values of four items, in every eighth group of values; a warp reads 512
// neighbouring bytes. sums[q][Tile * 4 + j] belongs to item lane % 4 * 4 + j. query: the words of all queries,
// interleaved.
template <int Q, int Tile>
__device__ __forceinline__ void add_tile(const char* tile, int stored_width, const uint32_t* query, int lane,
                                         int (&sums)[Q][8]) {
    constexpr int kLoads = 8;
    const uint4* p = reinterpret_cast<const uint4*>(tile) + lane;
    int at = 0;
#pragma unroll 1
    for (; at + 32 * kLoads <= stored_width; at += 32 * kLoads) {
        uint4 v[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) v[i] = __ldcs(p + at + 32 * i);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) add_values<Q, Tile>(v[i], query, (at + lane) / 4 + 8 * i, sums);
    }
#pragma unroll 4
    for (at += lane; at < stored_width; at += 32) add_values<Q, Tile>(__ldcs(p + (at - lane)), query, at / 4, sums);
}

__device__ __forceinline__ float2 of_bf16(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// A tile of bfloat16 items. Eight neighbouring lanes read 128 bytes of an item; sums belong to items j * 4 + lane / 8.
template <int Q, int Tile>
__device__ __forceinline__ void add_tile(const char* tile, int stored_width, const uint32_t* query, int lane,
                                         float (&sums)[Q][8]) {
    const int chunks = stored_width / 8;
    const uint4* p = reinterpret_cast<const uint4*>(tile) + lane / 8 * chunks;
#pragma unroll 1
    for (int at = lane % 8; at < chunks; at += 8) {
        uint4 v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = __ldcs(p + j * 4 * chunks + at);
        const float4* q = reinterpret_cast<const float4*>(query) + at * 2;
        const float4 low = q[0], high = q[1];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 a = of_bf16(v[j].x), b = of_bf16(v[j].y), c = of_bf16(v[j].z), d = of_bf16(v[j].w);
            float sum = sums[0][Tile * 4 + j];
            sum = fmaf(a.x, low.x, sum), sum = fmaf(a.y, low.y, sum);
            sum = fmaf(b.x, low.z, sum), sum = fmaf(b.y, low.w, sum);
            sum = fmaf(c.x, high.x, sum), sum = fmaf(c.y, high.y, sum);
            sum = fmaf(d.x, high.z, sum), sum = fmaf(d.y, high.w, sum);
            sums[0][Tile * 4 + j] = sum;
        }
    }
}

// Sums eight values over eight lanes that are `apart` lanes from each other: lane `part` gets the sum of s[part].
template <class T>
__device__ __forceinline__ T sum_over_lanes(T* s, int part, int apart) {
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
        const bool upper = (part & half) != 0;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const T mine = upper ? s[i + half] : s[i], other = upper ? s[i] : s[i + half];
            s[i] = mine + __shfl_xor_sync(kAll, other, half * apart);
        }
    }
    return s[0];
}

}  // namespace fastrerank::cuda
