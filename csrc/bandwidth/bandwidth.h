// ops.bandwidth: the memory bandwidth of a CUDA device for a kernel that only reads. Launchers are asynchronous on
// `stream` and return the launch's error.
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

// Whether this build holds machine code, or PTX to compile, for the current device.
bool has_code();

}  // namespace fastrerank::cuda
