// Self-attention of one document, all heads: keys and values of a head are packed into panels (they fit L1/L2),
// then row tiles go scores -> softmax -> product with the values without leaving the cache. No mask tensor: the
// document's bounds and the window are loop bounds.

// Key panel: [dim / kStep][key][kStep]. In 32-bit units this is a transpose for both formats.
template <class P>
INLINE void pack_keys(const char* k, int64_t ldk, int keys, int keys_padded, int units, int32_t* out) {
    for (int t0 = 0; t0 < keys_padded; t0 += P::kVectors * VL) {
        const int width = keys_padded - t0 < P::kVectors * VL ? keys_padded - t0 : P::kVectors * VL;
        int32_t* panel = out + static_cast<int64_t>(t0) * units;
        for (int t = 0; t < width; t += VL) {
            for (int u = 0; u < units; u += VL) {
                const int columns = units - u < VL ? units - u : VL;
                transpose_block(k + (t0 + t) * ldk + u * 4, ldk, keys - t0 - t, columns,
                                panel + static_cast<int64_t>(u) * width + t, width);
            }
        }
    }
}

// Value panel: [key / kStep][dim][kStep], dims in panels of `dims` columns.
template <class P>
INLINE void pack_values(const char* v, int64_t ldv, int keys, int keys_padded, int head_dim, int dims, char* out) {
    for (int d0 = 0; d0 < head_dim; d0 += dims) {
        const int width = head_dim - d0 < dims ? head_dim - d0 : dims;
        char* panel = out + static_cast<int64_t>(d0) * keys_padded * P::kElement;
        for (int t = 0; t < keys_padded; t += P::kStep, panel += width * P::kStep * P::kElement) {
            const char* row = v + t * ldv + d0 * P::kElement;
            for (int d = 0; d < width; d += VL) {
                if constexpr (P::kStep == 1) {
                    store(reinterpret_cast<float*>(panel) + d,
                          t < keys ? load(reinterpret_cast<const float*>(row) + d) : vf{});
                } else {
                    const uint16_t* pair = reinterpret_cast<const uint16_t*>(row);
                    const vu even = t < keys ? __builtin_convertvector(load_as<vh>(pair + d), vu) : vu{};
                    const vu odd = t + 1 < keys ? __builtin_convertvector(load_as<vh>(pair + ldv / 2 + d), vu) : vu{};
                    store_as(reinterpret_cast<uint32_t*>(panel) + d, even | odd << 16);
                }
            }
        }
    }
}

// Scores [begin, end) of one row become probabilities times their sum; those outside [lo, hi) become 0.
template <class P>
INLINE float softmax_row(float* s, void* p, int begin, int end, int lo, int hi, float scale) {
    for (int j = begin; j < lo; ++j) s[j] = -1e30f;
    for (int j = hi; j < end; ++j) s[j] = -1e30f;
    vf m = load(s + begin);
    for (int j = begin + VL; j < end; j += VL) m = vmax(m, load(s + j));
    const float c = scale * 1.4426950408889634f;
    const float shift = reduce_max(m) * c;
    vf sum = {};
    for (int j = begin; j < end; j += VL) {
        const vf e = exp2v<P::kStep == 1 ? 5 : 3>(load(s + j) * c - shift);
        sum += e;
        P::store_input(p, j, e);
    }
    return reduce_add(sum);
}

template <class P>
struct AttentionHead {
    const Attention& g;
    const char* q;        // this head's queries
    char* out;            // this head's outputs
    const char *keys, *values;
    float* s;             // (kRows, keys_padded)
    char* p;              // (kRows, keys_padded) in P's input format; s itself for float32
    int keys_padded, dims;

    template <int MR, int NV>
    ALWAYS_INLINE void scores(int row, int t0) const {
        vf c[MR][NV];
        UNROLL for (int i = 0; i < MR; ++i) UNROLL for (int j = 0; j < NV; ++j) c[i][j] = vf{};
        const int64_t lda = g.ldq * P::kElement;
        multiply<P, MR, NV>(c, q + row * lda, lda, keys + static_cast<int64_t>(t0) * g.head_dim * P::kElement,
                            g.head_dim / P::kStep);
        UNROLL for (int i = 0; i < MR; ++i) UNROLL for (int j = 0; j < NV; ++j)
            store(s + i * keys_padded + t0 + j * VL, c[i][j]);
    }

    template <int MR, int NV>
    ALWAYS_INLINE void values_product(int row, int d0, int begin, int end, const float* inverse) const {
        vf c[MR][NV];
        UNROLL for (int i = 0; i < MR; ++i) UNROLL for (int j = 0; j < NV; ++j) c[i][j] = vf{};
        const char* b = values + (static_cast<int64_t>(d0) * keys_padded + begin * NV * VL) * P::kElement;
        multiply<P, MR, NV>(c, p + begin * P::kElement, keys_padded * P::kElement, b, (end - begin) / P::kStep);
        const size_t element = bytes_of(g.out_format);
        UNROLL for (int i = 0; i < MR; ++i) UNROLL for (int j = 0; j < NV; ++j) {
            char* y = out + ((row + i) * g.ldo + d0 + j * VL) * element;
            const vf v = c[i][j] * inverse[i];
#ifdef FASTRERANK_NATIVE_BF16
            if (g.out_format == Format::kBF16) {
                store_bf16(reinterpret_cast<uint16_t*>(y), v);
                continue;
            }
#endif
            store(reinterpret_cast<float*>(y), v);
        }
    }

    template <int MR>
    void run(int row) const {
        constexpr int NV = P::kVectors, W = P::kVectors * VL;
        const int first = g.query_start + row, last = first + MR - 1;
        const bool all = g.window < 0;
        const int lo = all || first < g.window ? 0 : first - g.window;
        const int hi = all || last + g.window + 1 > g.keys ? g.keys : last + g.window + 1;
        const int begin = lo / W * W;
        const int end = static_cast<int>(padded(hi));
        for (int t = begin; t < end; t += W) {
            const int left = (keys_padded - t) / VL;
            if (left >= NV)
                scores<MR, NV>(row, t);
            else if (NV > 2 && left == 2)
                scores<MR, 2>(row, t);
            else
                scores<MR, 1>(row, t);
        }
        float inverse[MR];
        for (int i = 0; i < MR; ++i) {
            const int at = first + i;
            const int row_lo = all || at < g.window ? 0 : at - g.window;
            const int row_hi = all || at + g.window + 1 > g.keys ? g.keys : at + g.window + 1;
            inverse[i] = 1.0f / softmax_row<P>(s + i * keys_padded, p + i * keys_padded * P::kElement, begin, end,
                                               row_lo, row_hi, g.scale);
        }
        for (int d = 0; d < g.head_dim; d += dims) {
            const int left = (g.head_dim - d) / VL;
            if (left >= NV && dims == W)
                values_product<MR, NV>(row, d, begin, end, inverse);
            else if (left >= 2)
                values_product<MR, 2>(row, d, begin, end, inverse);
            else
                values_product<MR, 1>(row, d, begin, end, inverse);
        }
    }
};

// Head dimensions in whole panels where they divide, else in pairs of vectors (64 = 2 x 32 rather than 48 + 16).
template <class P>
INLINE int value_panel(int head_dim) {
    return head_dim % (P::kVectors * VL) == 0 ? P::kVectors * VL : 2 * VL;
}

template <class P>
void attention_with(const Attention& g) {
    const int keys_padded = static_cast<int>(padded(g.keys));
    const int64_t panel_bytes = static_cast<int64_t>(keys_padded) * g.head_dim * P::kElement;
    char* keys = g.scratch;
    char* values = keys + panel_bytes;
    float* s = reinterpret_cast<float*>(values + panel_bytes);
    char* p = P::kStep == 1 ? reinterpret_cast<char*>(s) : reinterpret_cast<char*>(s + P::kRows * keys_padded);
    const int dims = value_panel<P>(g.head_dim);
    for (int h = 0; h < g.heads; ++h) {
        const int64_t column = static_cast<int64_t>(h) * g.head_dim;
        const char* k = static_cast<const char*>(g.k) + column * P::kElement;
        const char* v = static_cast<const char*>(g.v) + column * P::kElement;
        pack_keys<P>(k, g.ldk * P::kElement, g.keys, keys_padded, g.head_dim / P::kStep,
                     reinterpret_cast<int32_t*>(keys));
        pack_values<P>(v, g.ldk * P::kElement, g.keys, keys_padded, g.head_dim, dims, values);
        const AttentionHead<P> head{g,      static_cast<const char*>(g.q) + column * P::kElement,
                                    static_cast<char*>(g.out) + column * bytes_of(g.out_format),
                                    keys,   values,
                                    s,      p,
                                    keys_padded, dims};
        for_row_tiles<P::kRows>(g.queries, head);
    }
}

void attention(const Attention& g) {
#ifdef FASTRERANK_NATIVE_BF16
    if (g.format == Format::kBF16) return attention_with<BF16>(g);
#endif
    attention_with<F32>(g);
}

size_t attention_scratch(Format format, int keys, int head_dim) {
    const size_t keys_padded = padded(keys);
    return keys_padded * (2 * head_dim * bytes_of(format) + F32::kRows * 4 + 8 * 4) + 64;
}

template <int NV>
struct MaxSimPanel {
    const float* tokens;
    int64_t ld;
    const char* b;
    int dim;
    float* best;
    template <int MR>
    void run(int row) const {
        vf c[MR][NV];
        UNROLL for (int i = 0; i < MR; ++i) UNROLL for (int j = 0; j < NV; ++j) c[i][j] = vf{};
        multiply<F32, MR, NV>(c, reinterpret_cast<const char*>(tokens + row * ld), ld * 4, b, dim);
        UNROLL for (int i = 0; i < MR; ++i) UNROLL for (int j = 0; j < NV; ++j)
            store(best + j * VL, vmax(load(best + j * VL), c[i][j]));
    }
};

void max_sim(const char* packed_query, int query_tokens, int dim, const float* tokens, int64_t ld,
             const int64_t* offsets, int documents, float* best, float* out) {
    const int n_padded = static_cast<int>(padded(query_tokens)), k_padded = (dim + 3) / 4 * 4;
    for (int d = 0; d < documents; ++d) {
        for (int i = 0; i < n_padded; ++i) best[i] = -__builtin_inff();
        const float* rows = tokens + offsets[d] * ld;
        const int count = static_cast<int>(offsets[d + 1] - offsets[d]);
        for (int n = 0; n < n_padded; n += F32::kVectors * VL) {
            const char* b = packed_query + static_cast<int64_t>(n) * k_padded * 4;
            const int left = (n_padded - n) / VL;
            if (left >= F32::kVectors)
                for_row_tiles<F32::kRows>(count, MaxSimPanel<F32::kVectors>{rows, ld, b, dim, best + n});
            else if (left == 2)
                for_row_tiles<F32::kRows>(count, MaxSimPanel<2>{rows, ld, b, dim, best + n});
            else
                for_row_tiles<F32::kRows>(count, MaxSimPanel<1>{rows, ld, b, dim, best + n});
        }
        double sum = 0;
        for (int i = 0; i < query_tokens; ++i) sum += best[i];
        out[d] = static_cast<float>(sum / query_tokens);
    }
}

// The tile on operands that stay in the first-level cache: what the multiply-add units can sustain.
template <class P>
INLINE double peak_with(int64_t iterations) {
    static const char zeros[P::kRows * 4 + P::kVectors * P::kBBytes] = {};
    const char* p = zeros;
    typename P::Acc c[P::kRows][P::kVectors] = {};
    for (int64_t it = 0; it < iterations; ++it) {
        asm volatile("" : "+r"(p));  // the operands may differ every time, as far as the compiler knows
        multiply<P, P::kRows, P::kVectors>(c, p, 4, p + P::kRows * 4, 1);
    }
    typename P::Acc sum = {};
    UNROLL for (int i = 0; i < P::kRows; ++i) UNROLL for (int j = 0; j < P::kVectors; ++j) sum += c[i][j];
    asm volatile("" ::"m"(sum));
    return 2.0 * iterations * P::kRows * P::kVectors * VL * P::kStep;
}
double peak(Precision precision, int64_t iterations) {
    switch (precision) {
        case Precision::kFloat32: return peak_with<F32>(iterations);
        case Precision::kBFloat16: return peak_with<BF16>(iterations);
        case Precision::kInt8: return peak_with<S8>(iterations);
    }
    return 0;
}
