// Vector words for one level: VL floats a vector, written with the compiler's vector extensions, so that one source
// serves every width. The level's file defines VL and includes this file in an anonymous namespace.
typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));
typedef uint8_t vb __attribute__((vector_size(VL)));

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define INLINE static ALWAYS_INLINE
#define UNROLL _Pragma("GCC unroll 16")

template <class V, class T>
INLINE V load_as(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <class V, class T>
INLINE void store_as(T* p, V v) {
    __builtin_memcpy(p, &v, sizeof v);
}
INLINE vf load(const float* p) { return load_as<vf>(p); }
INLINE void store(float* p, vf v) { store_as(p, v); }
INLINE vf splat(float x) { return x - vf{}; }  // x + 0 would be an addition, because -0 + 0 is 0
INLINE vi splat_int(int32_t x) { return vi{} + x; }
// a > b ? a : b and a < b ? a : b. If either is NaN, both return b. GCC compiles the generic forms to a comparison and
// a blend.
#if VL == 16
INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif VL == 8
INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__SSE2__)
INLINE vf vmax(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
INLINE vf vmin(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
#else
INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
#endif
INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }

// Reductions add halves of the lanes, in one fixed order.
template <int W>
INLINE vf upper_half(vf v) {  // lanes [W, 2 W) moved to [0, W)
    vi lanes;
    for (int i = 0; i < VL; ++i) lanes[i] = i < W ? i + W : i;
#if defined(__clang__)
    vf moved;
    for (int i = 0; i < VL; ++i) moved[i] = v[lanes[i]];
    return moved;
#else
    return __builtin_shuffle(v, lanes);
#endif
}
INLINE float reduce_add(vf v) {
    if constexpr (VL >= 16) v += upper_half<8>(v);
    if constexpr (VL >= 8) v += upper_half<4>(v);
    v += upper_half<2>(v);
    return v[0] + v[1];
}
INLINE float reduce_max(vf v) {
    if constexpr (VL >= 16) v = vmax(v, upper_half<8>(v));
    if constexpr (VL >= 8) v = vmax(v, upper_half<4>(v));
    v = vmax(v, upper_half<2>(v));
    return v[0] > v[1] ? v[0] : v[1];
}

// GCC 12 converts a 512-bit vector in two halves, so this is written with an intrinsic.
#if VL == 16
INLINE vu widen(const uint16_t* p) { return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
#else
INLINE vu widen(const uint16_t* p) { return __builtin_convertvector(load_as<vh>(p), vu); }
#endif
INLINE vf widen_bf16(const uint16_t* p) { return (vf)(widen(p) << 16); }

// float16 to float32 by rescaling the exponent; exact for finite values (checkpoints with infinities are refused).
INLINE vf widen_f16(const uint16_t* p) {
    const vu h = widen(p);
    const vf magnitude = (vf)((h & 0x7fff) << 13) * 0x1p112f;
    return (vf)((vu)magnitude | (h & 0x8000) << 16);
}
INLINE float to_float(const void* p, int64_t i, Source source) {
    if (source == Source::kF32) return static_cast<const float*>(p)[i];
    const uint32_t h = static_cast<const uint16_t*>(p)[i];
    uint32_t bits = h << 16;
    if (source == Source::kF16) {
        float magnitude;
        bits = (h & 0x7fff) << 13;
        if ((h & 0x7c00) == 0x7c00) return __builtin_nanf("");
        __builtin_memcpy(&magnitude, &bits, 4);
        magnitude *= 0x1p112f;
        return h & 0x8000 ? -magnitude : magnitude;
    }
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
}

// float32 to bfloat16: to nearest, ties to even; NaN stays NaN.
INLINE uint16_t round_bf16(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    return static_cast<uint16_t>(x == x ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : u >> 16 | 0x40);
}

// 2^x for x <= 127. Below -127 the result is 0 or at most 2^-126; NaN stays NaN. The relative error is 8e-8 (Degree 5)
// or 8e-5 (Degree 3, for 8-bit mantissas).
template <int Degree>
INLINE vf exp2v(vf x) {
#ifdef FASTRERANK_SCALEF
    const vf z = round_nearest(x), f = x - z;
#else
    x = vmax(splat(-127.0f), x);  // this order keeps NaN
    const vf z = x + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low mantissa bits
    const vf f = x - (z - 12582912.0f);
#endif
    vf p;
    if constexpr (Degree == 5) {
        p = f * 0.0013276466634124517f + 0.009675540961325169f;
        p = p * f + 0.05550713464617729f;
        p = p * f + 0.24022120237350464f;
        p = p * f + 0.6931469440460205f;
        p = p * f + 1.0f;
    } else {
        p = f * 0.055171623826026917f + 0.2426111251115799f;
        p = p * f + 0.6932609677314758f;
        p = p * f + 0.9999280571937561f;
    }
#ifdef FASTRERANK_SCALEF
    return scale_by_power(p, z);  // gives 0 and infinity without a clamp
#else
    return p * (vf)(((vi)z << 23) + (127 << 23));
#endif
}
INLINE vf expv(vf x) { return exp2v<5>(vmin(x * 1.4426950408889634f, splat(127.0f))); }

// x * Phi(x) with Phi(x) - 1/2 = x P(x^2) / Q(x^2) fitted on |x| <= 5.2: absolute error 2.4e-7 |x| in float32. The
// result is exactly 0 below -5.2.
INLINE vf gelu(vf x) {
    const vf c = vmin(vmax(x, splat(-5.2f)), splat(5.2f));
    const vf t = c * c;
    vf p = t * 5.838022389070829e-06f + 0.00031411563395522535f;
    p = p * t + 0.005517813377082348f;
    p = p * t + 0.04958069324493408f;
    p = p * t + 0.39894190430641174f;
    vf q = t * 5.017071202928491e-07f + 0.00011268508387729526f;
    q = q * t + 0.002702918369323015f;
    q = q * t + 0.03733216971158981f;
    q = q * t + 0.29094114899635315f;
    q = q * t + 1.0f;
    return x < splat(-5.2f) ? vf{} : x * (c * (p / q) + 0.5f);
}

// max(x, 0) - |x| (1 - Phi(|x|)), where the second term is a polynomial on |x| <= 3.94 and 0 beyond: absolute error
// 1.8e-4 with seven multiplications. The other operations run on units that the products do not use.
INLINE vf gelu_fast(vf x) {
    const vf magnitude = vabs(x);
    const vf a = vmin(splat(3.94f), magnitude);  // this order keeps NaN
    vf p = a * -0.0006683843093924224f + 0.010254940949380398f;
    p = p * a - 0.0592704676091671f;
    p = p * a + 0.14426983892917633f;
    p = p * a - 0.04833002761006355f;
    p = p * a - 0.3875109851360321f;
    p = p * a + 0.49981170892715454f;
    return vmax(x, vf{}) - a * p;
}

// The clamp inside expv drops NaN, but NaN must reach the result to be reported.
INLINE vf sigmoid(vf x) { return x == x ? 1.0f / (expv(-x) + 1.0f) : x; }
// Odd by construction, about 3 ulp: a polynomial fitted on |x| <= 0.55, where 1 - 2 / (e^2x + 1) would cancel.
INLINE vf tanhv(vf x) {
    const vf t = x * x;
    vf p = t * -0.006282467395067215f + 0.021077753975987434f;
    p = p * t - 0.05385385826230049f;
    p = p * t + 0.13332602381706238f;
    p = p * t - 0.33333319425582886f;
    const vf small = x * (p * t) + x;
    const vf e = expv(vabs(x) * 2.0f);
    const vf large = 1.0f - 2.0f / (e + 1.0f);
    const vf signed_large = (vf)((vi)large | ((vi)x & (int32_t)0x80000000));
    return vabs(x) >= splat(0.55f) ? signed_large : small;  // NaN takes `small`, which keeps it
}

INLINE void activate(float* x, int vectors, Activation act, bool fast) {
    switch (act) {
        case Activation::kIdentity: return;
        case Activation::kGelu:
            if (fast)
                for (int i = 0; i < vectors; ++i) store(x + i * VL, gelu_fast(load(x + i * VL)));
            else
                for (int i = 0; i < vectors; ++i) store(x + i * VL, gelu(load(x + i * VL)));
            return;
        case Activation::kGeluTanh:
            for (int i = 0; i < vectors; ++i) {
                const vf v = load(x + i * VL);
                const vf u = v * (v * v * 0.044715f + 1.0f) * 1.5957691216057308f;  // 2 sqrt(2 / pi)
                store(x + i * VL, v * sigmoid(u));
            }
            return;
        case Activation::kRelu:
            for (int i = 0; i < vectors; ++i) {
                const vf v = load(x + i * VL);
                store(x + i * VL, v < vf{} ? vf{} : v);
            }
            return;
        case Activation::kTanh:
            for (int i = 0; i < vectors; ++i) store(x + i * VL, tanhv(load(x + i * VL)));
            return;
        case Activation::kSilu:
            for (int i = 0; i < vectors; ++i) {
                const vf v = load(x + i * VL);
                store(x + i * VL, v * sigmoid(v));
            }
            return;
        case Activation::kSigmoid:
            for (int i = 0; i < vectors; ++i) store(x + i * VL, sigmoid(load(x + i * VL)));
            return;
    }
}

// Policies that need only vector words: float32, and bfloat16 weights that are widened on load. The latter is for
// levels without a bfloat16 dot product; their inputs stay float32.
template <int Rows, int Vectors>
struct FloatPolicy {
    using Acc = vf;
    using A = vf;
    using B = vf;
    static constexpr int kStep = 1, kInputs = 4, kABytes = 4, kBBytes = VL * 4, kElement = 4, kRows = Rows,
                         kVectors = Vectors;
    INLINE A load_a(const char* p) { return splat(*reinterpret_cast<const float*>(p)); }
    INLINE B load_b(const char* p) { return load(reinterpret_cast<const float*>(p)); }
    INLINE void dot(Acc& c, A a, B b) { c += a * b; }
    INLINE void store_input(void* p, int at, vf v) { store(static_cast<float*>(p) + at, v); }
};

template <int Rows, int Vectors>
struct WideningBf16Policy : FloatPolicy<Rows, Vectors> {
    static constexpr int kBBytes = VL * 2;
    INLINE vf load_b(const char* p) { return widen_bf16(reinterpret_cast<const uint16_t*>(p)); }
};

#if VL < 16  // avx512.inl has its own
// dst[u * width + t] = src[t][u] for VL rows of `columns` <= VL 32-bit units; rows at or beyond `rows` read as zero.
INLINE void transpose_block(const char* src, int64_t ld, int rows, int columns, int32_t* dst, int width) {
    for (int t = 0; t < VL; ++t) {
        const int32_t* s = reinterpret_cast<const int32_t*>(src + t * ld);
        for (int u = 0; u < columns; ++u) dst[u * width + t] = t < rows ? s[u] : 0;
    }
}

// The low byte of every lane of four vectors, in order.
INLINE void store_low_bytes(uint8_t* q, vu a, vu b, vu c, vu d) {
    store_as(q, __builtin_convertvector(a, vb));
    store_as(q + VL, __builtin_convertvector(b, vb));
    store_as(q + 2 * VL, __builtin_convertvector(c, vb));
    store_as(q + 3 * VL, __builtin_convertvector(d, vb));
}
#endif
