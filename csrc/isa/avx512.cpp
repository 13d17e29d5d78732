// AVX-512 with VNNI and without BF16: Cascade Lake, Ice Lake.
#include "isa/kernels.h"
#if defined(__AVX512VNNI__)
#include <immintrin.h>

namespace fastrerank::cpu {
namespace {
constexpr Isa kIsa = Isa::kAvx512;
constexpr const char* kName = "avx512";
#include "isa/avx512.inl"
#include "isa/level.inl"
}  // namespace

const Kernels* avx512_kernels() { return &kTable; }
}  // namespace fastrerank::cpu
#else
const fastrerank::cpu::Kernels* fastrerank::cpu::avx512_kernels() { return nullptr; }
#endif
