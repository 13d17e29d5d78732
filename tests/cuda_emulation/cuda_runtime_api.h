// Enough of CUDA C++ for g++ to compile csrc/cuda/cur_topk.cu and run its kernels on a CPU: one block after the other,
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
inline int atomicAdd(int* place, int step) {
    emulated::pause();
    const int before = __atomic_fetch_add(place, step, __ATOMIC_RELAXED);
    emulated::pause();
    return before;
}
inline void atomicMin(unsigned long long* place, unsigned long long value) {
    emulated::pause();
    unsigned long long before = __atomic_load_n(place, __ATOMIC_RELAXED);
    while (value < before &&
           !__atomic_compare_exchange_n(place, &before, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    emulated::pause();
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
inline int __dp4a(int a, int b, int sum) {
    for (int shift = 0; shift < 32; shift += 8)
        sum += static_cast<int8_t>(a >> shift) * static_cast<int8_t>(b >> shift);
    return sum;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline float2 make_float2(float x, float y) { return {x, y}; }
using std::fabs;
using std::ilogb;
using std::ldexp;
using std::min;
using std::rint;

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
