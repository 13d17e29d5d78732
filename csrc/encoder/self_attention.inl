// Self-attention of one document, head by head. The keys and values of a head are packed into panels, which fit in L1
// or L2. For each tile of queries, scores become weights in registers, and weights become outputs in the first-level
// cache. There is no mask tensor: the document's bounds and the window are loop bounds.

// The largest squared length of a key, from the panels.
template <class P>
INLINE float longest_key(const char* keys, int keys_padded, int units) {
    vf longest = {};
    for (int t0 = 0; t0 < keys_padded; t0 += 2 * VL) {
        const int width = keys_padded - t0 < 2 * VL ? keys_padded - t0 : 2 * VL;
        const char* panel = keys + static_cast<int64_t>(t0) * units * 4;
        for (int t = 0; t < width; t += VL) {
            vf square = {};
            for (int u = 0; u < units; ++u) {
                const char* at = panel + (static_cast<int64_t>(u) * width + t) * 4;
                P::dot(square, load_as<typename P::A>(at), P::load_b(at));
            }
            longest = vmax(square, longest);  // this order keeps NaN
        }
    }
    return reduce_max(longest);
}

template <class P>
INLINE float squared_length(const char* row, int n) {
    vf sum = {};
    for (int i = 0; i < n; i += VL) {
        vf x;
        if constexpr (P::kStep == 1)
            x = load(reinterpret_cast<const float*>(row) + i);
        else
            x = widen_bf16(reinterpret_cast<const uint16_t*>(row) + i);
        sum += x * x;
    }
    return reduce_add(sum);
}

// A row's weights are 2^(c score - shift), divided by their sum. Any shift that keeps them in float32's range gives the
// same result, and |c score| <= c |q| max |k|. Where that bound is at most kNoShift, the shift is 0: weights of 2^-64
// .. 2^64 are as exact as any others, and no pass over the scores has to find their maximum. Other rows subtract the
// maximum, which takes a second product.
constexpr float kNoShift = 64.0f;

template <class P>
struct SelfAttentionHead {
    // Most heads, and most documents' padded keys, are multiples of two vectors. There are as many accumulators as in
    // the products.
    static constexpr int kRows = P::kRows * P::kVectors / 2, kVectors = 2;

    const SelfAttention& g;
    const char* q;        // this head's queries
    char* out;            // this head's outputs
    const char *keys, *values;
    char* p;              // (kRows, keys_padded) weights in P's input format
    int keys_padded;
    float c;              // scale * log2(e)
    float reach;          // the largest squared length of a key, times c^2

    // The keys that the row at position `at` sees.
    int first_key(int at) const { return g.window < 0 || at < g.window ? 0 : at - g.window; }
    int last_key(int at) const { return g.window < 0 || at + g.window + 1 > g.keys ? g.keys : at + g.window + 1; }

    template <int MR, int NV>
    ALWAYS_INLINE void scores(vf (&s)[MR][NV], int row, int t) const {
        UNROLL for (int i = 0; i < MR; ++i) UNROLL for (int j = 0; j < NV; ++j) s[i][j] = vf{};
        const int64_t lda = g.ldq * P::kElement;
        multiply<P, MR, NV>(s, q + row * lda, lda, keys + static_cast<int64_t>(t) * g.head_dim * P::kElement,
                            g.head_dim / P::kStep);
    }

    // x in the lanes of the keys from t on that the row at `at` sees, `other` in the others.
    ALWAYS_INLINE vf seen(vf x, int t, int at, float other) const {
        vi key;
        for (int i = 0; i < VL; ++i) key[i] = t + i;
        return (key >= first_key(at)) & (key < last_key(at)) ? x : splat(other);
    }

    template <int MR, int NV>
    ALWAYS_INLINE void largest(int row, int t, float* most) const {
        vf s[MR][NV];
        scores<MR, NV>(s, row, t);
        for (int i = 0; i < MR; ++i) {
            vf m = load(most + i * VL);
            for (int j = 0; j < NV; ++j) m = vmax(seen(s[i][j], t + j * VL, g.query_start + row + i, -1e30f), m);
            store(most + i * VL, m);
        }
    }

    template <int MR, int NV, bool kAll>
    __attribute__((noinline)) void weights(int row, int t, const float* shift, float* sums) const {
        vf s[MR][NV];
        scores<MR, NV>(s, row, t);
        UNROLL for (int i = 0; i < MR; ++i) {
            vf sum = load(sums + i * VL);
            UNROLL for (int j = 0; j < NV; ++j) {
                vf e = exp2v<P::kStep == 1 ? 5 : 3>(s[i][j] * c - shift[i]);
                if constexpr (!kAll) e = seen(e, t + j * VL, g.query_start + row + i, 0.0f);
                sum += e;
                P::store_input(p, i * keys_padded + t + j * VL, e);
            }
            store(sums + i * VL, sum);
        }
    }

    template <int MR, int NV>
    __attribute__((noinline)) void values_product(int row, int d0, int begin, int end, const float* inverse) const {
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

    ALWAYS_INLINE bool bounded(int row) const {  // false for NaN
        return squared_length<P>(q + row * g.ldq * P::kElement, g.head_dim) * reach <= kNoShift * kNoShift;
    }

    template <int MR>
    __attribute__((noinline)) void find_shifts(int row, int begin, int end, float* shift) const {
        alignas(64) float most[MR * VL];
        for (int i = 0; i < MR * VL; ++i) most[i] = -1e30f;
        for (int t = begin; t < end; t += kVectors * VL) {
            if (keys_padded - t >= kVectors * VL)
                largest<MR, kVectors>(row, t, most);
            else
                largest<MR, 1>(row, t, most);
        }
        for (int i = 0; i < MR; ++i) shift[i] = bounded(row + i) ? 0.0f : reduce_max(load(most + i * VL)) * c;
    }

    template <int MR>
    void run(int row) const {
        constexpr int W = kVectors * VL;
        const int first = g.query_start + row, last = first + MR - 1;
        const int begin = first_key(first) / W * W, end = static_cast<int>(padded(last_key(last)));
        const int all_from = first_key(last), all_to = last_key(first);  // keys that every row of the tile sees
        alignas(64) float sums[MR * VL] = {};
        float shift[MR] = {};
        bool all = true;
        for (int i = 0; i < MR; ++i) all &= bounded(row + i);
        if (!all) find_shifts<MR>(row, begin, end, shift);
        for (int t = begin; t < end; t += W) {
            if (t >= all_from && t + W <= all_to)
                weights<MR, kVectors, true>(row, t, shift, sums);
            else if (keys_padded - t >= W)
                weights<MR, kVectors, false>(row, t, shift, sums);
            else
                weights<MR, 1, false>(row, t, shift, sums);
        }
        float inverse[MR];
        for (int i = 0; i < MR; ++i) inverse[i] = 1.0f / reduce_add(load(sums + i * VL));
        for (int d = 0; d < g.head_dim; d += W) {
            if (g.head_dim - d >= W)
                values_product<MR, kVectors>(row, d, begin, end, inverse);
            else
                values_product<MR, 1>(row, d, begin, end, inverse);
        }
    }
};

template <class P>
void self_attention_with(const SelfAttention& g) {
    const int keys_padded = static_cast<int>(padded(g.keys));
    const int64_t panel_bytes = static_cast<int64_t>(keys_padded) * g.head_dim * P::kElement;
    char* keys = g.scratch;
    char* values = keys + panel_bytes;
    char* p = values + panel_bytes;
    const int units = g.head_dim / P::kStep;
    const float c = g.scale * 1.4426950408889634f;
    for (int h = 0; h < g.heads; ++h) {
        const int64_t column = static_cast<int64_t>(h) * g.head_dim;
        const char* k = static_cast<const char*>(g.k) + column * P::kElement;
        const char* v = static_cast<const char*>(g.v) + column * P::kElement;
        pack_keys(k, g.ldk * P::kElement, g.keys, keys_padded, units, SelfAttentionHead<P>::kVectors * VL,
                  reinterpret_cast<int32_t*>(keys));
        pack_values<P>(v, g.ldk * P::kElement, g.keys, keys_padded, g.head_dim, SelfAttentionHead<P>::kVectors * VL,
                       values);
        const SelfAttentionHead<P> head{g,
                                    static_cast<const char*>(g.q) + column * P::kElement,
                                    static_cast<char*>(g.out) + column * bytes_of(g.out_format),
                                    keys,
                                    values,
                                    p,
                                    keys_padded,
                                    c,
                                    longest_key<P>(keys, keys_padded, units) * c * c};
        for_row_tiles<SelfAttentionHead<P>::kRows>(g.queries, head);
    }
}

#ifdef FASTRERANK_TILES
#include "encoder/self_attention_amx.inl"
#endif

void self_attention(const SelfAttention& g) {
#ifdef FASTRERANK_TILES
    if (g.format == Format::kBF16) return self_attention_on_tiles(g);
#endif
#ifdef FASTRERANK_NATIVE_BF16
    if (g.format == Format::kBF16) return self_attention_with<BF16>(g);
#endif
    self_attention_with<F32>(g);
}

size_t self_attention_scratch(Format format, int keys, int head_dim) {
#ifdef FASTRERANK_TILES
    if (format == Format::kBF16) return tile_self_attention_scratch(keys, head_dim);
#endif
    const size_t keys_padded = padded(keys);
    return keys_padded * (2 * head_dim + SelfAttentionHead<F32>::kRows) * bytes_of(format) + 64;
}
