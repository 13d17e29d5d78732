// Matrix products on packed weights. A level's file defines, per precision, a policy:
//   Acc            vector of VL accumulators          kStep     inputs consumed by one dot step
//   kInputs        k is stored in multiples of it
//   A, B           broadcast input, weight vector     kABytes   bytes of one row's input per step
//   load_a, load_b, dot(acc, a, b)                    kBBytes   bytes of VL columns' weights per step
// and the register tile: kRows x (kVectors * VL) outputs.
//
// Packed layout: panels of kVectors * VL columns, the last one narrower; inside a panel [k / kStep][column][kStep]. A
// panel is streamed once per row tile. The accumulators stay in registers up to the epilogue, so no int32 or float
// matrix is written and read again.

// With kAhead, each step prefetches one cache line at `ahead` into the second-level cache; `ahead` advances by
// `stride`.
template <class P, int MR, int NV, bool kAhead = false>
INLINE void multiply(typename P::Acc (&c)[MR][NV], const char* a, int64_t lda, const char* b, int steps,
                     const char* ahead = nullptr, int64_t stride = 0) {
    for (int s = 0; s < steps; ++s) {
        if constexpr (kAhead) __builtin_prefetch(ahead, 0, 2), ahead += stride;
        typename P::B w[NV];
    UNROLL for (int j = 0; j < NV; ++j) w[j] = P::load_b(b + j * P::kBBytes);
        UNROLL for (int i = 0; i < MR; ++i) {
            const typename P::A x = P::load_a(a + i * lda);
            UNROLL for (int j = 0; j < NV; ++j) P::dot(c[i][j], x, w[j]);
        }
        a += P::kABytes;
        b += NV * P::kBBytes;
    }
}

// The epilogue's values for a vector of columns: bias, and for int8 the scale and the scaled sum of weights.
struct Columns {
    vf bias, scale, sum;
};
template <class P>
INLINE Columns columns_at(const PackedMatrix& w, int n) {
    Columns c{};
    c.bias = load(w.bias + n);
    if constexpr (P::kElement == 1) c.scale = load(w.scale + n), c.sum = load(w.sum + n);
    return c;
}

// The output for a sum c; int8 needs the row's scale, and `zero`, the scale times the zero point.
INLINE vf finish(const Columns& w, vf c, float, float) { return c + w.bias; }
INLINE vf finish(const Columns& w, vi c, float scale, float zero) {
    return __builtin_convertvector(c, vf) * (w.scale * scale) + (w.bias - w.sum * zero);
}

// The epilogue's values for a tile's rows.
template <class Acc, int MR>
struct Rows {
    ALWAYS_INLINE Rows(const Linear&, int) {}
    ALWAYS_INLINE vf output(const Columns& w, vf c, int) const { return finish(w, c, 0, 0); }
};
template <int MR>
struct Rows<vi, MR> {
    float scale[MR], zero[MR];
    ALWAYS_INLINE Rows(const Linear& g, int row) {
        for (int i = 0; i < MR; ++i) {
            const RowScale x = g.x_scale[row + i];
            scale[i] = x.scale;
            zero[i] = x.scale * static_cast<float>(x.zero);
        }
    }
    ALWAYS_INLINE vf output(const Columns& w, vi c, int i) const { return finish(w, c, scale[i], zero[i]); }
};

INLINE void store_output(const Linear& g, int64_t at, vf v) {
    if (g.mul) v *= load(g.mul + at);
    if (g.add) v += load(g.add + at);
#ifdef FASTRERANK_NATIVE_BF16
    if (g.y_format == Format::kBF16) {
        store_bf16(static_cast<uint16_t*>(g.y) + at, v);
        return;
    }
#endif
    store(static_cast<float*>(g.y) + at, v);
}

template <class P, int MR, int NV>
void linear_tile(const Linear& g, int row, int n, const char* b, int steps, const char* ahead, int64_t stride) {
    typename P::Acc c[MR][NV];
    UNROLL for (int i = 0; i < MR; ++i) UNROLL for (int j = 0; j < NV; ++j) c[i][j] = typename P::Acc{};
    const int64_t lda = g.ldx * P::kElement;
    multiply<P, MR, NV, true>(c, static_cast<const char*>(g.x) + row * lda, lda, b, steps, ahead, stride);

    const Rows<typename P::Acc, MR> rows(g, row);
    const int64_t ldy = g.ldy, at = row * ldy + n;
    // Calls put(row, vector, output) for the whole tile. The outer loop is over columns, whose three vectors stay in
    // registers for all rows.
    const auto each = [&](const auto& put) __attribute__((always_inline)) {
        UNROLL for (int j = 0; j < NV; ++j) {
            const Columns w = columns_at<P>(*g.w, n + j * VL);
            UNROLL for (int i = 0; i < MR; ++i) put(i, j, rows.output(w, c[i][j], i));
        }
    };
    const auto to = [=](int i, int j) { return at + i * ldy + j * VL; };
    // The common cases have loops of their own, without a branch or a load of a pointer for each vector: the compiler
    // must assume that a store changes g.
    const bool gelu = g.act == Activation::kGelu && g.fast_act;
    if (!g.mul && !(gelu && g.add) && (gelu || g.act == Activation::kIdentity)) {
        float* y = static_cast<float*>(g.y);
#ifdef FASTRERANK_NATIVE_BF16
        uint16_t* half = static_cast<uint16_t*>(g.y);
        if (g.y_format == Format::kBF16 && !g.add) {
            if (gelu) return each([=](int i, int j, vf v) { store_bf16(half + to(i, j), gelu_fast(v)); });
            return each([=](int i, int j, vf v) { store_bf16(half + to(i, j), v); });
        }
#endif
        const float* add = g.add;
        if (g.y_format == Format::kF32) {
            if (gelu) return each([=](int i, int j, vf v) { store(y + to(i, j), gelu_fast(v)); });
            if (add) return each([=](int i, int j, vf v) { store(y + to(i, j), v + load(add + to(i, j))); });
            return each([=](int i, int j, vf v) { store(y + to(i, j), v); });
        }
    }
    alignas(64) float t[MR * NV * VL];
    each([&](int i, int j, vf v) { store(t + (i * NV + j) * VL, v); });
    activate(t, MR * NV, g.act, g.fast_act);
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < NV; ++j) store_output(g, at + i * ldy + j * VL, load(t + (i * NV + j) * VL));
}

template <class P, int NV>
INLINE void linear_panel(const Linear& g, int n, const char* b, int steps) {
    // Each row tile prefetches a share of the next panel. Without that, float32 products of 384-wide models wait a
    // fifth of their time for weights on Sapphire Rapids.
    int row = 0;
    const int tiles = (g.rows + P::kRows - 1) / P::kRows;
    const int64_t panel = static_cast<int64_t>(steps) * NV * P::kBBytes, stride = panel / tiles / steps;
    const char* ahead = b + panel;
    for (; row + P::kRows / 2 < g.rows; row += P::kRows, ahead += stride * steps)
        linear_tile<P, P::kRows, NV>(g, row, n, b, steps, ahead, stride);
    if (row < g.rows) linear_tile<P, P::kRows / 2, NV>(g, row, n, b, steps, ahead, stride);
}

template <class P>
void linear_with(const Linear& g) {
    static_assert(P::kRows <= kRowTile);
    const int steps = g.w->k_padded / P::kStep;
    for (int n = 0; n < g.w->n_padded; n += P::kVectors * VL) {
        const char* b = g.w->data + static_cast<int64_t>(n) * steps * P::kBBytes / VL;
        const int left = (g.w->n_padded - n) / VL;
        if (left >= P::kVectors)
            linear_panel<P, P::kVectors>(g, n, b, steps);
        else if (left == 2)
            linear_panel<P, 2>(g, n, b, steps);
        else
            linear_panel<P, 1>(g, n, b, steps);
    }
}

// Calls f.template run<MR>(row) for whole row tiles, then for tiles of 8, 4, 2 and 1.
template <int MR, class F>
INLINE void for_row_tiles(int rows, const F& f) {
    int row = 0;
    for (; row + MR <= rows; row += MR) f.template run<MR>(row);
    if constexpr (MR > 8)
        if (row + 8 <= rows) f.template run<8>(row), row += 8;
    if constexpr (MR > 4)
        if (row + 4 <= rows) f.template run<4>(row), row += 4;
    if constexpr (MR > 2)
        if (row + 2 <= rows) f.template run<2>(row), row += 2;
    if constexpr (MR > 1)
        if (row + 1 <= rows) f.template run<1>(row);
}

// The policies that weights are packed for.
#ifdef FASTRERANK_TILES
#include "linear/linear_amx.inl"
constexpr bool kTiles = true;
using StoredF32 = TileF32;
using StoredBF16 = TileBF16;
using StoredS8 = TileS8;
#define REDUCED tile_linear
#else
constexpr bool kTiles = false;
using StoredF32 = F32;
using StoredBF16 = BF16;
using StoredS8 = S8;
#define REDUCED linear_with
#endif

Format input_format(Precision p) {
    if (p == Precision::kInt8) return Format::kU8;
    if (p == Precision::kBFloat16 && BF16::kElement == 2) return Format::kBF16;
    return kTiles && p == Precision::kFloat32 ? Format::kTerms : Format::kF32;
}

void linear(const Linear& g) {
    if (!g.rows) return;  // linear_panel divides by the number of row tiles
    switch (g.w->precision) {
        case Precision::kFloat32:
#ifdef FASTRERANK_TILES
            if (g.terms) return tile_linear<TileTerms>(g);
#endif
            return linear_with<StoredF32>(g);
        case Precision::kBFloat16: return REDUCED<StoredBF16>(g);
        case Precision::kInt8: return REDUCED<StoredS8>(g);
    }
}
#undef REDUCED

INLINE bool finite(float x) { return __builtin_fabsf(x) <= 3.4028235e38f; }

// Inputs that a panel stores: k rounded up, with zeros.
template <class P>
INLINE int stored_inputs(int k) {
    return (k + P::kInputs - 1) / P::kInputs * P::kInputs;
}

template <class P, class Store>
bool pack_with(const void* w, Source source, int64_t ldw, int n, int k, const Store& put) {
    constexpr int kBlock = 16;
    const int n_padded = static_cast<int>(padded(n)), k_padded = stored_inputs<P>(k);
    bool ok = true;
    for (int n0 = 0; n0 < n_padded; n0 += P::kVectors * VL) {
        const int width = n_padded - n0 < P::kVectors * VL ? n_padded - n0 : P::kVectors * VL;
        // A block of inputs keeps its cache lines in L1 until all columns of the panel are written.
        for (int i0 = 0; i0 < k_padded; i0 += kBlock) {
            const int end = k_padded - i0 < kBlock ? k_padded : i0 + kBlock;
            for (int c = 0; c < width; ++c) {
                const int64_t at = static_cast<int64_t>(n0) * k_padded + c * P::kStep;
                const auto set = [&](int i, float x) {
                    put(at + static_cast<int64_t>(i / P::kStep) * width * P::kStep + i % P::kStep, n0 + c, x);
                };
                const int stored = n0 + c >= n || k <= i0 ? i0 : end < k ? end : k;
                for (int i = i0; i < stored; ++i) {
                    const float x = to_float(w, (n0 + c) * ldw + i, source);
                    ok &= finite(x);
                    set(i, x);
                }
                for (int i = stored; i < end; ++i) set(i, 0.0f);
            }
        }
    }
    return ok;
}

bool pack(Precision precision, const void* w, Source source, int64_t ldw, int n, int k, char* data, float* scale,
          float* sum) {
    if (precision == Precision::kFloat32)
        return pack_with<StoredF32>(w, source, ldw, n, k,
                              [=](int64_t at, int, float x) { reinterpret_cast<float*>(data)[at] = x; });
    if (precision == Precision::kBFloat16)
        return pack_with<StoredBF16>(w, source, ldw, n, k,
                               [=](int64_t at, int, float x) { reinterpret_cast<uint16_t*>(data)[at] = round_bf16(x); });
    const int n_padded = static_cast<int>(padded(n));
    for (int c = 0; c < n_padded; ++c) {
        float amax = 0;
        for (int i = 0; c < n && i < k; ++i) {
            const float x = __builtin_fabsf(to_float(w, c * ldw + i, source));
            amax = x > amax ? x : amax;
        }
        scale[c] = amax > 0 ? amax / 127.0f : 1.0f;
        sum[c] = 0;
    }
    // Sums of integers below 2^24 are exact in float, so they are scaled when they are complete.
    const bool ok = pack_with<StoredS8>(w, source, ldw, n, k, [=](int64_t at, int c, float x) {
        const float r = x / scale[c];
        const int q = static_cast<int>(r + (r < 0 ? -0.5f : 0.5f));
        reinterpret_cast<int8_t*>(data)[at] = static_cast<int8_t>(q);
        sum[c] += static_cast<float>(q);
    });
    for (int c = 0; c < n_padded; ++c) sum[c] *= scale[c];
    return ok;
}

size_t packed_bytes(Precision precision, int n, int k) {
    const size_t columns = padded(n);
    switch (precision) {
        case Precision::kFloat32: return columns * stored_inputs<StoredF32>(k) * 4;
        case Precision::kBFloat16: return columns * stored_inputs<StoredBF16>(k) * 2;
        case Precision::kInt8: return columns * stored_inputs<StoredS8>(k);
    }
    return 0;
}
