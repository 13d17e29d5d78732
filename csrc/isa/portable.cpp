// The level that any 64-bit CPU runs: 128-bit vectors (SSE2, NEON) without any further instruction set.
#include "isa/kernels.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fastrerank::cpu {
namespace {
#define VL 4
#include "isa/vec.inl"

constexpr Isa kIsa = Isa::kPortable;
constexpr const char* kName = "portable";
constexpr int kU8Max = 255;

// Pairs of inputs against pairs of weights, both widened to 16 bits: exact, |sum of two| <= 2 * 255 * 127.
struct S8 {
    using Acc = vi;
    using A = vi;
    using B = vi;
    static constexpr int kStep = 2, kInputs = 4, kABytes = 2, kBBytes = VL * 2, kElement = 1, kRows = 4, kVectors = 2;
    INLINE A load_a(const char* p) {
        const auto u = reinterpret_cast<const uint8_t*>(p);
        return splat_int(u[0] | u[1] << 16);
    }
#if defined(__SSE2__)
    INLINE B load_b(const char* p) {
        const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        return (vi)_mm_srai_epi16(_mm_unpacklo_epi8(b, b), 8);
    }
    INLINE void dot(Acc& c, A a, B b) { c += (vi)_mm_madd_epi16((__m128i)a, (__m128i)b); }
#else
    INLINE B load_b(const char* p) {
        typedef int8_t s8 __attribute__((vector_size(8)));
        typedef int16_t s16 __attribute__((vector_size(16)));
        return (vi) __builtin_convertvector(load_as<s8>(p), s16);
    }
    INLINE void dot(Acc& c, A a, B b) { c += (a & 0xffff) * (b << 16 >> 16) + (a >> 16) * (b >> 16); }
#endif
};

using F32 = FloatPolicy<4, 2>;
using BF16 = WideningBf16Policy<4, 2>;
#include "isa/level.inl"
}  // namespace

const Kernels* portable_kernels() { return &kTable; }
}  // namespace fastrerank::cpu
