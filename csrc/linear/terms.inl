// float32 as the sum of three bfloat16 terms. Each term is the remainder of the terms before it, rounded to 8 bits;
// three times 8 bits with their signs hold a float32's 24 bits. So the sum is exact, unless a term falls below 2^-126,
// because products take denormals for zeros. That needs |x| < 2^-110, and the error is below 2^-126.
//
// An infinity or NaN is its own first term. A value that would round to infinity is truncated instead.
struct Terms {
    vu t[3];  // in the words' upper halves; the third's lower half is not used
};

INLINE __mmask16 not_finite(vf x) { return _mm512_fpclass_ps_mask((__m512)x, 0x99); }

// noinline and by value, so that the rare case costs the common one no registers.
__attribute__((noinline)) inline Terms split_edge(vf x) {
    const __mmask16 odd = not_finite(x), nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
    const vu quiet = (vu)_mm512_mask_or_epi32((__m512i)x, nan, (__m512i)x, _mm512_set1_epi32(0x400000));
    const vu near = ((vu)x + 0x8000) & 0xffff0000;
    const vu a = (vu)_mm512_mask_mov_epi32((__m512i)near, odd | not_finite((vf)near), (__m512i)(quiet & 0xffff0000));
    const vf r = (vf)_mm512_maskz_sub_ps(~odd, (__m512)x, (__m512)a);
    const vu b = ((vu)r + 0x8000) & 0xffff0000;
    return {{a, b, (vu)(r - (vf)b)}};
}
// Ties round away from zero, which takes one addition and is as close as any other way. Where the first term is
// infinite, the others are infinite or NaN.
INLINE Terms split_finite(vf x) {
    const vu a = ((vu)x + 0x8000) & 0xffff0000;
    const vf r = x - (vf)a;
    const vu b = ((vu)r + 0x8000) & 0xffff0000;
    return {{a, b, (vu)(r - (vf)b)}};
}
INLINE Terms split(vf x) {
    const Terms terms = split_finite(x);
    return __builtin_expect(not_finite((vf)terms.t[0]), 0) ? split_edge(x) : terms;
}

// The order of the upper halves of two vectors' words: one vector's after the other's, or alternating.
struct Halves {
    uint16_t after[2 * VL], in_turn[2 * VL];
    constexpr Halves() : after{}, in_turn{} {
        for (int i = 0; i < VL; ++i) {
            after[i] = static_cast<uint16_t>(2 * i + 1), after[VL + i] = static_cast<uint16_t>(2 * (VL + i) + 1);
            in_turn[2 * i] = after[i], in_turn[2 * i + 1] = after[VL + i];
        }
    }
};
alignas(64) constexpr Halves kHalves;
INLINE __m512i upper_halves(const uint16_t (&order)[2 * VL], vu a, vu b) {
    return _mm512_permutex2var_epi16((__m512i)a, _mm512_load_si512(order), (__m512i)b);
}

// A row in Format::kTerms: three rows of bfloat16, `ld` values apart.
INLINE void store_terms(uint16_t* p, int64_t ld, vf v) {
    const Terms x = split(v);
    for (int t = 0; t < 3; ++t) store_as(p + t * ld, _mm512_cvtepi32_epi16((__m512i)(x.t[t] >> 16)));
}
INLINE void store_terms(uint16_t* p, int64_t ld, vf v, vf w) {
    const Terms x = split(v), y = split(w);
    for (int t = 0; t < 3; ++t) store_as(p + t * ld, upper_halves(kHalves.after, x.t[t], y.t[t]));
}
INLINE float join_terms(const uint16_t* p, int64_t ld) {
    float x[3];
    for (int t = 0; t < 3; ++t) {
        const uint32_t bits = static_cast<uint32_t>(p[t * ld]) << 16;
        __builtin_memcpy(x + t, &bits, 4);
    }
    return x[2] + x[1] + x[0];
}
