// Passes over rows: layer norm, conversion to an activation format, rotary embedding, sum of embeddings.

// q = round(x / scale) + zero maps the row's range [lo, hi], which includes 0, to 0 .. kU8Max - 1. One level is left
// free because the rounding of the zero point can move the ends by half a step. The range is asymmetric because a
// GELU's row is nearly all positive: half of a symmetric range would not be used.
template <bool kFactor>
INLINE void quantise_row(const float* x, const float* factor, int width, uint8_t* q, RowScale* scale) {
    const auto value = [&](int i) { return kFactor ? load(x + i) * load(factor + i) : load(x + i); };
    vf lo = {}, hi = {}, bad = {};
    for (int i = 0; i < width; i += VL) {
        const vf v = value(i);
        lo = vmin(lo, v);
        hi = vmax(hi, v);
        bad += v * 0.0f;
    }
    const float range = reduce_max(hi) + reduce_max(-lo);
    // NaN and infinity have no 8-bit form: they make the scale NaN, and so every output of the row. A row so small that
    // the inverse would overflow becomes zeros.
    const float inverse = range > 1e-30f ? (kU8Max - 1) / range : 0.0f;
    // The small addend makes half a step round up. If it rounded down while `shifted` below rounds up, a value of -1
    // would wrap to 255.
    const float zero = __builtin_rintf(reduce_max(-lo) * inverse + 0x1p-12f);
    *scale = {range > 1e-30f ? range / (kU8Max - 1) + reduce_add(bad) : reduce_add(bad), static_cast<int32_t>(zero)};
    const auto shifted = [&](int i) { return (vu)(value(i) * inverse + (12582912.0f + zero)); };  // 1.5 * 2^23 + ..
    int i = 0;
    for (; i + 4 * VL <= width; i += 4 * VL)
        store_low_bytes(q + i, shifted(i), shifted(i + VL), shifted(i + 2 * VL), shifted(i + 3 * VL));
    for (; i < width; i += VL) store_as(q + i, __builtin_convertvector(shifted(i), vb));
}

INLINE void convert_row(const float* x, int n, const Stored& s, int64_t r) {
    const int width = static_cast<int>(padded(n));
    char* q = static_cast<char*>(s.q) + r * s.ldq * bytes_of(s.format);
    if (s.format == Format::kU8) {
        uint8_t* bytes = reinterpret_cast<uint8_t*>(q);
        if (s.factor) return quantise_row<true>(x, s.factor, width, bytes, s.scale + r);
        return quantise_row<false>(x, nullptr, width, bytes, s.scale + r);
    }
#ifdef FASTRERANK_NATIVE_BF16
    if (s.format == Format::kBF16) {
        for (int i = 0; i < width; i += VL) store_bf16(reinterpret_cast<uint16_t*>(q) + i, load(x + i));
        return;
    }
#endif
#ifdef FASTRERANK_TILES
    if (s.format == Format::kTerms) {
        for (int i = 0; i < width; i += VL) store_terms(reinterpret_cast<uint16_t*>(q) + i, s.ldq, load(x + i));
        return;
    }
#endif
    for (int i = 0; i < width; i += VL) store(reinterpret_cast<float*>(q) + i, load(x + i));
}

void convert(const float* x, int64_t ldx, int rows, int n, const Stored& s) {
    for (int r = 0; r < rows; ++r) convert_row(x + r * ldx, n, s, r);
}

void layer_norm(const LayerNorm& g) {
    const int width = static_cast<int>(padded(g.n));
    const int full = g.n / VL * VL;
    const float inverse_n = 1.0f / static_cast<float>(g.n);
    float ones[VL];  // 1 in the last vector's true columns, 0 in its padding
    for (int i = 0; i < VL; ++i) ones[i] = full + i < g.n ? 1.0f : 0.0f;
    const vf last = load(ones);
    for (int r = 0; r < g.rows; ++r) {
        const float* x = g.x + r * g.ldx;
        vf s0 = {}, s1 = {};
        int i = 0;
        for (; i + 2 * VL <= width; i += 2 * VL) s0 += load(x + i), s1 += load(x + i + VL);
        if (i < width) s0 += load(x + i);
        const float mean = reduce_add(s0 + s1) * inverse_n;
        vf v0 = {}, v1 = {};
        for (i = 0; i + 2 * VL <= full; i += 2 * VL) {
            const vf d0 = load(x + i) - mean, d1 = load(x + i + VL) - mean;
            v0 += d0 * d0, v1 += d1 * d1;
        }
        if (i < full) {
            const vf d = load(x + i) - mean;
            v0 += d * d;
        }
        if (full < g.n) {
            const vf d = (load(x + full) - mean) * last;
            v1 += d * d;
        }
        const float inverse = 1.0f / __builtin_sqrtf(reduce_add(v0 + v1) * inverse_n + g.eps);
        float* y = g.y + r * g.ldy;
        for (i = 0; i < width; i += VL) {
            const vf d = (load(x + i) - mean) * (load(g.gamma + i) * inverse);
            store(y + i, g.beta ? d + load(g.beta + i) : d);
        }
        for (const Stored& s : g.inputs)
            if (s.q) convert_row(y, g.n, s, r);
    }
}

void rope(const float* x, int64_t ldx, const int32_t* positions, const float* cos, const float* sin, int rows,
          int heads, int head_dim, int half, void* y, int64_t ldy, Format format) {
    float t[512];
    for (int r = 0; r < rows; ++r) {
        const float* c = cos + static_cast<int64_t>(positions[r]) * half;
        const float* s = sin + static_cast<int64_t>(positions[r]) * half;
        for (int h = 0; h < heads; ++h) {
            const float* a = x + r * ldx + h * head_dim;
            for (int i = 0; i < half; ++i) {
                const float down = a[i + half] * s[i], up = a[i] * s[i];
                t[i] = a[i] * c[i] - down;
                t[i + half] = a[i + half] * c[i] + up;
            }
            for (int i = 2 * half; i < head_dim; ++i) t[i] = a[i];
            char* target = static_cast<char*>(y) + (r * ldy + h * head_dim) * bytes_of(format);
            convert_row(t, head_dim, {target, 0, nullptr, nullptr, format}, 0);
        }
    }
}

INLINE void add_word(float* x, const void* word, Source source, int64_t at, int n) {
    int i = 0;
    if (source == Source::kF32)
        for (const float* w = static_cast<const float*>(word) + at; i + VL <= n; i += VL) store(x + i, load(w + i));
    else if (source == Source::kBF16)
        for (const uint16_t* w = static_cast<const uint16_t*>(word) + at; i + VL <= n; i += VL)
            store(x + i, widen_bf16(w + i));
    else
        for (const uint16_t* w = static_cast<const uint16_t*>(word) + at; i + VL <= n; i += VL)
            store(x + i, widen_f16(w + i));
    for (; i < n; ++i) x[i] = to_float(word, at + i, source);
    for (; i < padded(n); ++i) x[i] = 0.0f;
}

void embed(const Embed& g) {
    const int64_t width = padded(g.n);
    for (int r = 0; r < g.rows; ++r) {
        float* x = g.x + r * g.ldx;
        add_word(x, g.word, g.word_source, static_cast<int64_t>(g.ids[r]) * g.n, g.n);
        const float* p = g.position ? g.position + g.positions[r] * width : nullptr;
        const float* t = g.type ? g.type + g.types[r] * width : nullptr;
        for (int64_t i = 0; i < width; i += VL) {
            vf v = load(x + i);
            if (t) v += load(t + i);
            if (p) v += load(p + i);
            store(x + i, v);
        }
    }
}
