// AVX-512 with VNNI and BF16: Cooper Lake, Sapphire Rapids, Zen 4 and later.
#include <cstdint>
#include "kernels.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#define FASTRERANK_NATIVE_BF16

namespace fastrerank::cpu {
namespace {
constexpr Isa kIsa = Isa::kAvx512Bf16;
constexpr const char* kName = "avx512_bf16";
#include "avx512.inl"

INLINE void store_bf16(uint16_t* p, vf v) { store_as(p, _mm512_cvtneps_pbh((__m512)v)); }

struct BF16 {
    using Acc = vf;
    using A = vi;
    using B = vi;
    static constexpr int kStep = 2, kABytes = 4, kBBytes = VL * 4, kElement = 2, kRows = 8, kVectors = 3;
    INLINE A load_a(const char* p) { return splat_int(load_as<int32_t>(p)); }
    INLINE B load_b(const char* p) { return load_as<vi>(p); }
    INLINE void dot(Acc& c, A a, B b) { asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); }
    INLINE void store_input(void* p, int at, vf v) { store_bf16(static_cast<uint16_t*>(p) + at, v); }
};
#include "level.inl"
}  // namespace

const Kernels* avx512_bf16_kernels() { return &kTable; }
}  // namespace fastrerank::cpu
#else
const fastrerank::cpu::Kernels* fastrerank::cpu::avx512_bf16_kernels() { return nullptr; }
#endif
