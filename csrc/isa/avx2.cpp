// AVX2 + FMA: 256-bit vectors, 16 registers.
#include "isa/kernels.h"
#if defined(__AVX2__)
#include <immintrin.h>

namespace fastrerank::cpu {
namespace {
#define VL 8
#include "isa/vec.inl"

constexpr Isa kIsa = Isa::kAvx2;
constexpr const char* kName = "avx2";
// vpmaddubsw adds two u8 x s8 products with saturation at 32767; 2 * 127 * 127 = 32258 stays below it. So inputs are
// kept in 0..127 (7 bits), and every sum is exact.
constexpr int kU8Max = 127;

struct F32 : FloatPolicy<4, 3> {
    INLINE void dot(Acc& c, A a, B b) { asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b)); }
};
using BF16 = WideningBf16Policy<4, 2>;
struct S8 {
    using Acc = vi;
    using A = vi;
    using B = vi;
    static constexpr int kStep = 4, kInputs = 4, kABytes = 4, kBBytes = VL * 4, kElement = 1, kRows = 4, kVectors = 2;
    INLINE A load_a(const char* p) { return splat_int(load_as<int32_t>(p)); }
    INLINE B load_b(const char* p) { return load_as<vi>(p); }
    INLINE void dot(Acc& c, A a, B b) {
        const __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
        c += (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
};
#include "isa/level.inl"
}  // namespace

const Kernels* avx2_kernels() { return &kTable; }
}  // namespace fastrerank::cpu
#else
const fastrerank::cpu::Kernels* fastrerank::cpu::avx2_kernels() { return nullptr; }
#endif
