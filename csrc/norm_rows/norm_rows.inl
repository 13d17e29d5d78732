// Norms of rows in float32.

// Sums run in blocks of columns, so that rounding errors grow with a block's length and the number of blocks, not with
// n.
constexpr int kSumColumns = 512;

INLINE vf widen_any_f16(const uint16_t* p) {  // infinities and NaN too
    const vu h = __builtin_convertvector(load_as<vh>(p), vu);
    const vu magnitude = (h & 0x7fff) << 13;
    const vu finite = (vu)((vf)magnitude * 0x1p112f);
    return (vf)(((h & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : finite) | (h & 0x8000) << 16);
}
template <Source S>
INLINE vf widen(const void* p, int64_t at) {
    if constexpr (S == Source::kF32) return load(static_cast<const float*>(p) + at);
    if constexpr (S == Source::kF16) return widen_any_f16(static_cast<const uint16_t*>(p) + at);
    if constexpr (S == Source::kBF16) return widen_bf16(static_cast<const uint16_t*>(p) + at);
}
// The last count < VL values, followed by zeros.
template <Source S>
INLINE vf widen_last(const void* p, int64_t at, int count) {
    constexpr int kBytes = S == Source::kF32 ? 4 : 2;
    char last[VL * kBytes] = {};
    __builtin_memcpy(last, static_cast<const char*>(p) + at * kBytes, count * kBytes);
    return widen<S>(last, 0);
}

template <class F>
INLINE float sum_columns(int width, const F& term) {
    vf total = {};
    for (int begin = 0; begin < width; begin += kSumColumns) {
        const int end = begin + kSumColumns < width ? begin + kSumColumns : width;
        vf sum = {};
        for (int i = begin; i < end; i += VL) sum += term(i);
        total += sum;
    }
    return reduce_add(total);
}

// y (padded(n),) = the normed row at x, with zeros in the padding.
template <Source S>
void normed_row(const NormRows& g, int64_t at, float* y) {
    const int n = g.n, full = n / VL * VL, width = static_cast<int>(padded(n));
    for (int i = 0; i < full; i += VL) store(y + i, widen<S>(g.x, at + i));
    for (int i = full; i < width; i += VL) store(y + i, vf{});
    if (full < n) store(y + full, widen_last<S>(g.x, at + full, n - full));
    if (g.norm == RowNorm::kNone) return;
    const float inverse_n = 1.0f / static_cast<float>(n);
    if (g.norm == RowNorm::kLayer) {
        const float mean = sum_columns(width, [&](int i) { return load(y + i); }) * inverse_n;
        for (int i = 0; i < full; i += VL) store(y + i, load(y + i) - mean);
        for (int i = full; i < n; ++i) y[i] -= mean;
    }
    const float squares = sum_columns(width, [&](int i) { return load(y + i) * load(y + i); });
    const float inverse = 1.0f / __builtin_sqrtf(squares * inverse_n + g.eps);
    for (int i = 0; i < full; i += VL) {
        vf v = load(y + i) * inverse;
        if (g.gamma) v *= load(g.gamma + i);
        if (g.beta) v += load(g.beta + i);
        store(y + i, v);
    }
    for (int i = full; i < n; ++i) {
        float v = y[i] * inverse;
        if (g.gamma) v *= g.gamma[i];
        if (g.beta) v += g.beta[i];
        y[i] = v;
    }
}

void norm_rows(const NormRows& g, int64_t begin, int64_t end, void* y, int64_t ldy, float* scratch) {
    for (int64_t row = begin; row < end; ++row) {
        if (g.x_source == Source::kF32) {
            normed_row<Source::kF32>(g, row * g.ldx, scratch);
            __builtin_memcpy(static_cast<float*>(y) + row * ldy, scratch, g.n * sizeof(float));
            continue;
        }
        normed_row<Source::kBF16>(g, row * g.ldx, scratch);
        uint16_t* to = static_cast<uint16_t*>(y) + row * ldy;
        int i = 0;
#ifdef FASTRERANK_NATIVE_BF16
        for (; i + VL <= g.n; i += VL) store_bf16(to + i, load(scratch + i));
#endif
        for (; i < g.n; ++i) to[i] = round_bf16(scratch[i]);
    }
}
