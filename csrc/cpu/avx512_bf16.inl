// What AVX-512 BF16 adds to the words of avx512.inl: rounding to bfloat16 and its dot product, in tiles of 8 rows x 48
// columns. Shared by the levels with and without AMX.
#define FASTRERANK_NATIVE_BF16
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
