// AVX-512 (F, BW, DQ, VL, VNNI): 512-bit vectors, 32 registers. Register tiles are 8 rows x 48 columns:
// 24 accumulators, 3 weight vectors, 1 broadcast. Shared by the three levels of AVX-512.
#define VL 16
#define FASTRERANK_SCALEF
typedef float vf16 __attribute__((vector_size(64)));
static inline __attribute__((always_inline)) vf16 round_nearest(vf16 x) {
    return (vf16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline __attribute__((always_inline)) vf16 scale_by_power(vf16 x, vf16 power) {
    return (vf16)_mm512_scalef_ps((__m512)x, (__m512)power);
}
#include "isa/vec.inl"

constexpr int kU8Max = 255;

// The products are one-line asm because GCC 12 spills a tile of intrinsics' accumulators to the stack, which costs
// 40 % of the peak; "+v" keeps each in a register.
struct S8 {
    using Acc = vi;
    using A = vi;
    using B = vi;
    static constexpr int kStep = 4, kInputs = 4, kABytes = 4, kBBytes = VL * 4, kElement = 1, kRows = 8, kVectors = 3;
    INLINE A load_a(const char* p) { return splat_int(load_as<int32_t>(p)); }
    INLINE B load_b(const char* p) { return load_as<vi>(p); }
    INLINE void dot(Acc& c, A a, B b) { asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); }
};

struct F32 : FloatPolicy<8, 3> {
    INLINE void dot(Acc& c, A a, B b) { asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); }
};

#if defined(__AVX512BF16__)
#define FASTRERANK_NATIVE_BF16
INLINE void store_bf16(uint16_t* p, vf v) { store_as(p, _mm512_cvtneps_pbh((__m512)v)); }

struct BF16 {
    using Acc = vf;
    using A = vi;
    using B = vi;
    static constexpr int kStep = 2, kInputs = 4, kABytes = 4, kBBytes = VL * 4, kElement = 2, kRows = 8, kVectors = 3;
    INLINE A load_a(const char* p) { return splat_int(load_as<int32_t>(p)); }
    INLINE B load_b(const char* p) { return load_as<vi>(p); }
    INLINE void dot(Acc& c, A a, B b) { asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); }
    INLINE void store_input(void* p, int at, vf v) { store_bf16(static_cast<uint16_t*>(p) + at, v); }
};
#else
using BF16 = WideningBf16Policy<8, 3>;
#endif

// 16 x 16 units through registers: four rounds of pairwise interleaving.
INLINE void transpose_block(const char* src, int64_t ld, int rows, int columns, int32_t* dst, int width) {
    const __mmask16 mask = static_cast<__mmask16>((1u << columns) - 1);
    __m512i r[16], s[16];
    if (rows >= 16) {
    UNROLL for (int i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi32(mask, src + i * ld);
    } else {
        UNROLL for (int i = 0; i < 16; ++i)
            r[i] = i < rows ? _mm512_maskz_loadu_epi32(mask, src + i * ld) : _mm512_setzero_si512();
    }
    UNROLL for (int i = 0; i < 16; i += 2) {
        s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; ++i) {
        s[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        s[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        s[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        s[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 8; ++i) {
        const int u0 = i, u1 = i + 8;
        if (u0 < columns) _mm512_storeu_si512(dst + u0 * width, _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88));
        if (u1 < columns) _mm512_storeu_si512(dst + u1 * width, _mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd));
    }
}

// The low byte of every lane of four vectors, in order: two rounds of narrowing by pairs within 128-bit lanes, then
// the lanes' dwords are put back in order.
INLINE void store_low_bytes(uint8_t* q, vu a, vu b, vu c, vu d) {
    const __m512i low = _mm512_set1_epi32(0xff);
    const __m512i ab = _mm512_packus_epi32(_mm512_and_si512((__m512i)a, low), _mm512_and_si512((__m512i)b, low));
    const __m512i cd = _mm512_packus_epi32(_mm512_and_si512((__m512i)c, low), _mm512_and_si512((__m512i)d, low));
    const __m512i bytes = _mm512_packus_epi16(ab, cd);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(q, _mm512_permutexvar_epi32(order, bytes));
}
