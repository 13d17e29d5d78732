// AVX-512 with VNNI and BF16: Cooper Lake, Sapphire Rapids, Zen 4 and later.
#include "isa/kernels.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>

namespace fastrerank::cpu {
namespace {
constexpr Isa kIsa = Isa::kAvx512Bf16;
constexpr const char* kName = "avx512_bf16";
#include "isa/avx512.inl"
#include "isa/level.inl"
}  // namespace

const Kernels* avx512_bf16_kernels() { return &kTable; }
}  // namespace fastrerank::cpu
#else
const fastrerank::cpu::Kernels* fastrerank::cpu::avx512_bf16_kernels() { return nullptr; }
#endif
