// Enough of CUDA C++ for g++ to compile csrc/cur_topk/cur_topk.cu and run its kernels on a CPU: one block after the other,
// its threads as fibers that run from barrier to barrier, see fibers.cpp.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulated {

struct Index {
    unsigned x;
};
inline Index thread{0}, block{0}, grid{1};
inline char* shared = nullptr;
inline cudaError_t error = cudaSuccess;
inline size_t allowed = 0;  // bytes of dynamic shared memory, of the kernel that was asked for last
inline const void* asked_for = nullptr;

constexpr size_t kDefaultShared = 48 << 10, kMostShared = 99 << 10;  // the least that a device of ours has

void seed(unsigned number);
void run(int blocks, int threads, size_t bytes, const std::function<void()>& body);
// Waits for all threads of the block; whether any of them says so.
bool meet(bool says);
// Waits for all threads of the warp; what each of them says, until it says something else.
struct Words {
    uint64_t word[3];
};
const Words* gather(const Words& says);
// Lets other threads run first, now and then.
void pause();

template <class... Parameters>
auto launch(void (*kernel)(Parameters...), int blocks, int threads, size_t bytes, cudaStream_t) {
    return [=](Parameters... given) {
        const bool known = asked_for == reinterpret_cast<const void*>(kernel);
        if (blocks < 1 || threads < 1 || threads > 1024 || bytes > (known ? allowed : kDefaultShared))
            error = cudaErrorInvalidValue;
        else
            run(blocks, threads, bytes, [=] { kernel(given...); });
    };
}

// mma.sync.m16n8k32 of unsigned with signed bytes. A lane has of a: rows lane / 4 and, in the odd words, lane / 4 + 8;
// columns lane % 4 * 4 on and, in the last two words, 16 more. Of b, in this order: rows lane % 4 * 4 on, and 16 more,
// of column lane / 4. Of c: rows lane / 4 and, in the last two, lane / 4 + 8; columns lane % 4 * 2 and the next.
inline void multiply(const uint32_t (&a)[4], uint32_t low, uint32_t high, int (&c)[4]) {
    Words own{};
    const uint32_t words[6] = {a[0], a[1], a[2], a[3], low, high};
    std::memcpy(&own, words, sizeof words);
    const Words* all = gather(own);
    const int lane = static_cast<int>(thread.x) % 32;
    const auto byte = [&](int of, int word, int place) {
        return static_cast<uint8_t>(all[of].word[word / 2] >> (word % 2 * 32 + place * 8));
    };
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        uint32_t sum = c[i];
        for (int k = 0; k < 32; ++k)
            sum += byte(row % 8 * 4 + k % 16 / 4, row / 8 + k / 16 * 2, k % 4) *
                   static_cast<int8_t>(byte(column * 4 + k % 16 / 4, 4 + k / 16, k % 4));
        c[i] = static_cast<int>(sum);
    }
}

}  // namespace emulated

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define threadIdx emulated::thread
#define blockIdx emulated::block
#define gridDim emulated::grid

inline void __syncthreads() { emulated::meet(false); }
inline int __syncthreads_or(int says) { return emulated::meet(says != 0); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int bits) {
    emulated::Words own{};
    const unsigned other = threadIdx.x % 32 ^ bits;
    std::memcpy(&own, &value, sizeof value);
    std::memcpy(&value, emulated::gather(own) + other, sizeof value);
    return value;
}
template <class T>
T atomicAdd(T* place, T step) {
    emulated::pause();
    const T before = __atomic_fetch_add(place, step, __ATOMIC_RELAXED);
    emulated::pause();
    return before;
}
inline int atomicOr(int* place, int bits) { return __atomic_fetch_or(place, bits, __ATOMIC_RELAXED); }
inline unsigned long long atomicMin(unsigned long long* place, unsigned long long value) {
    emulated::pause();
    unsigned long long before = __atomic_load_n(place, __ATOMIC_RELAXED);
    while (value < before &&
           !__atomic_compare_exchange_n(place, &before, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return before;
}
inline void __threadfence() {}
template <class T>
T __ldcs(const T* place) {
    return *place;
}
template <class T>
T __ldg(const T* place) {
    return *place;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline float2 make_float2(float x, float y) { return {x, y}; }
using std::max;
using std::min;

inline cudaError_t cudaGetLastError() {
    const cudaError_t last = emulated::error;
    emulated::error = cudaSuccess;
    return last;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
    if (bytes < 0 || static_cast<size_t>(bytes) > emulated::kMostShared) return cudaErrorInvalidValue;
    emulated::asked_for = reinterpret_cast<const void*>(kernel), emulated::allowed = bytes;
    return cudaSuccess;
}
