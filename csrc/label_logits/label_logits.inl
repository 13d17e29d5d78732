// A few rows of an LM head at a few positions: norm and dot products of a row in float32.

// Not inlined: the compiler could contract it to fused multiply-adds in some tiles and not in others.
__attribute__((noinline)) float logit_of(const LabelLogits& g, int label, float dot) {
    float logit = dot * g.scale;
    if (g.bias) logit += g.bias[label];
    return g.softcap > 0 ? g.softcap * __builtin_tanhf(logit / g.softcap) : logit;
}

// Products of R rows of y with L label rows from `label` on. All tiles sum a dot product in the same order.
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
