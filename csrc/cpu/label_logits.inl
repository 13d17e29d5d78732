// Few rows of an LM head at few positions: norm and dot products of a row, all in float32.

// Sums run in blocks of columns: rounding errors grow with a block's length and the number of blocks, not with n.
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
// The last count < VL values, zeros behind them.
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

// y (padded(n),) = the row at x, normed; zeros in the padding.
template <Source S>
void normed_row(const LabelLogits& g, int64_t at, float* y) {
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

// One function for all tiles: compiled into each, it could be contracted to fused multiply-adds in some only.
__attribute__((noinline)) float logit_of(const LabelLogits& g, int label, float dot) {
    float logit = dot * g.scale;
    if (g.bias) logit += g.bias[label];
    return g.softcap > 0 ? g.softcap * __builtin_tanhf(logit / g.softcap) : logit;
}

// R rows of y with L label rows from `label` on. Every dot product is summed in the same order in every tile.
template <Source S, int R, int L>
void label_tile(const LabelLogits& g, const float* y, int64_t ldy, int label, float* out) {
    const int full = g.n / VL * VL;
    const int64_t w = label * g.ldw;
    vf total[R][L] = {};
    for (int begin = 0; begin < full; begin += kSumColumns) {
        const int end = begin + kSumColumns < full ? begin + kSumColumns : full;
        vf sum[R][L] = {};
        for (int i = begin; i < end; i += VL) {
            vf row[R];
    UNROLL for (int r = 0; r < R; ++r) row[r] = load(y + r * ldy + i);
            UNROLL for (int j = 0; j < L; ++j) {
                const vf v = widen<S>(g.w, w + j * g.ldw + i);
                UNROLL for (int r = 0; r < R; ++r) sum[r][j] += row[r] * v;
            }
        }
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int j = 0; j < L; ++j) total[r][j] += sum[r][j];
    }
    if (full < g.n)
        for (int j = 0; j < L; ++j) {
            const vf v = widen_last<S>(g.w, w + j * g.ldw + full, g.n - full);
            for (int r = 0; r < R; ++r) total[r][j] += load(y + r * ldy + full) * v;
        }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < L; ++j)
            out[static_cast<int64_t>(r) * g.labels + label + j] = logit_of(g, label + j, reduce_add(total[r][j]));
}

template <Source S>
void label_rows(const LabelLogits& g, const float* y, int rows, float* out) {
    const int64_t ldy = padded(g.n);
    int j = 0;
    if (rows == kLabelRows) {
        for (; j + 2 <= g.labels; j += 2) label_tile<S, kLabelRows, 2>(g, y, ldy, j, out);
        if (j < g.labels) label_tile<S, kLabelRows, 1>(g, y, ldy, j, out);
        return;
    }
    for (int r = 0; r < rows; ++r, y += ldy, out += g.labels) {
        for (j = 0; j + 4 <= g.labels; j += 4) label_tile<S, 1, 4>(g, y, ldy, j, out);
        for (; j < g.labels; ++j) label_tile<S, 1, 1>(g, y, ldy, j, out);
    }
}

void label_logits(const LabelLogits& g, int64_t begin, int64_t end, float* scratch) {
    for (int64_t row = begin; row < end; row += kLabelRows) {
        const int rows = static_cast<int>(row + kLabelRows < end ? kLabelRows : end - row);
        for (int r = 0; r < rows; ++r) {
            float* y = scratch + r * padded(g.n);
            const int64_t at = (row + r) * g.ldx;
            if (g.x_source == Source::kF32) normed_row<Source::kF32>(g, at, y);
            if (g.x_source == Source::kF16) normed_row<Source::kF16>(g, at, y);
            if (g.x_source == Source::kBF16) normed_row<Source::kBF16>(g, at, y);
        }
        float* out = g.out + row * g.labels;
        if (g.w_source == Source::kF32) label_rows<Source::kF32>(g, scratch, rows, out);
        if (g.w_source == Source::kF16) label_rows<Source::kF16>(g, scratch, rows, out);
        if (g.w_source == Source::kBF16) label_rows<Source::kBF16>(g, scratch, rows, out);
    }
}

INLINE uint16_t rounded_bf16(float x) {  // to nearest, ties to even; NaN stays NaN
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    return static_cast<uint16_t>(x == x ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : u >> 16 | 0x40);
}

void norm_rows(const LabelLogits& g, int64_t begin, int64_t end, void* y, int64_t ldy, float* scratch) {
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
        for (; i < g.n; ++i) to[i] = rounded_bf16(scratch[i]);
    }
}
