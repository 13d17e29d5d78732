// The scan of packed items. Products of a block of tiles with a block of queries stay in registers or the first-level
// cache; only items that may be among a query's best are written out.

// The lanes in which a is not below b, or either is NaN.
INLINE unsigned not_below(vf a, vf b) {
#if VL == 16
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLT_UQ);
#elif VL == 8
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLT_UQ)));
#elif defined(__SSE2__)
    return static_cast<unsigned>(_mm_movemask_ps(_mm_cmpnlt_ps((__m128)a, (__m128)b)));
#else
    unsigned lanes = 0;
    for (int i = 0; i < VL; ++i) lanes |= static_cast<unsigned>(!(a[i] < b[i])) << i;
    return lanes;
#endif
}

// Appends the chosen lanes; about one item in a hundred gets here. The bounds of an infinite item are infinite. A whole
// vector is written, for which a reservoir has room. Returns true if the reservoir is full.
__attribute__((noinline)) bool append(CurReservoir& r, vf score, vf bound, unsigned lanes, int32_t first) {
    const vf upper = score + bound, lower = score - bound;
#if VL == 16
    const __m512 infinity = _mm512_set1_ps(__builtin_inff()), u = (__m512)upper, l = (__m512)lower;
    const __m512 most = _mm512_mask_mov_ps(u, _mm512_cmp_ps_mask(u, u, _CMP_UNORD_Q), infinity);
    const __m512 least = _mm512_mask_sub_ps(l, _mm512_cmp_ps_mask(l, l, _CMP_UNORD_Q), _mm512_setzero_ps(), infinity);
    const __m512i ids = _mm512_add_epi32(_mm512_set1_epi32(first),
                                         _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    const __mmask16 kept = static_cast<__mmask16>(lanes);
    _mm512_storeu_ps(r.upper + r.count, _mm512_maskz_compress_ps(kept, most));
    _mm512_storeu_ps(r.lower + r.count, _mm512_maskz_compress_ps(kept, least));
    _mm512_storeu_si512(r.ids + r.count, _mm512_maskz_compress_epi32(kept, ids));
    r.count += __builtin_popcount(lanes);
#else
    for (; lanes; lanes &= lanes - 1) {
        const int i = __builtin_ctz(lanes);
        r.upper[r.count] = upper[i] == upper[i] ? upper[i] : __builtin_inff();
        r.lower[r.count] = lower[i] == lower[i] ? lower[i] : -__builtin_inff();
        r.ids[r.count++] = first + i;
    }
#endif
    return r.count > r.limit;
}

INLINE vf norms_of(const CurScan& g, const char* tile, int at) {
    return load(reinterpret_cast<const float*>(tile + g.tile_bytes - kCurTile * 4) + at);
}
// Residuals of int8 items: the lower half of the word whose upper half is the norm. The whole word, read as the norm,
// exceeds it by a factor of at most 1 + 2^-7.
INLINE vf residuals_of(const CurScan& g, const char* tile, int at) {
    return (vf)(load_as<vi>(tile + g.tile_bytes - kCurTile * 4 + at * 4) << 16);
}
INLINE vf scales_of(const CurScan& g, int64_t item, int lanes) {
    if (!g.scale) return splat(1.0f);
    if (lanes == VL) return load(g.scale + item);
    vf s = splat(1.0f);
    for (int i = 0; i < lanes; ++i) s[i] = g.scale[item + i];
    return s;
}

// Keeps those of VL items whose products reach the query's threshold within its bounds. lanes: those that hold items.
// Returns true if the query's reservoir is full.
template <bool Scaled>
INLINE bool keep(const CurScan& g, int query, vf product, vf norm, vf residual, vf scale, int64_t item,
                 unsigned lanes) {
    CurReservoir& r = g.reservoirs[query];
    vf bound = norm * g.slack[query] + residual * g.spread[query] + g.constant[query];
    if (Scaled) product *= scale, bound *= scale;
    const unsigned passing = not_below(product + bound, splat(r.threshold)) & lanes;
    if (__builtin_expect(passing == 0, 1)) return false;
    return append(r, product, bound, passing, g.first + static_cast<int32_t>(item));
}

#if VL != 16
// products[r][i] of a tile of 16 int8 items with Q queries.
template <int Q>
INLINE void int8_products(const CurScan& g, const char* tile, const int8_t* q, int32_t (*products)[kCurTile]) {
#if VL == 8
    // Values and queries are widened to 16 bits: |255 * 127 * 2| is far below 2^31. The two pairs of an item's group
    // lie in neighbouring lanes, which are added at the end.
    __m256i sum[Q][4];
    for (int r = 0; r < Q; ++r)
        for (int v = 0; v < 4; ++v) sum[r][v] = _mm256_setzero_si256();
    for (int at = 0; at < g.width; at += 4) {
        __m256i a[Q];
        for (int r = 0; r < Q; ++r)
            a[r] = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(load_as<int32_t>(q + r * g.ldq + at))));
        for (int v = 0; v < 4; ++v) {
            const __m256i b =
                _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + at * kCurTile) + v));
            for (int r = 0; r < Q; ++r) sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(a[r], b));
        }
    }
    for (int r = 0; r < Q; ++r)
        for (int v = 0; v < 4; v += 2)
            store_as(products[r] + v * 4, _mm256_permute4x64_epi64(_mm256_hadd_epi32(sum[r][v], sum[r][v + 1]), 0xd8));
#else
    for (int r = 0; r < Q; ++r)
        for (int i = 0; i < kCurTile; ++i) products[r][i] = 0;
    const uint8_t* values = reinterpret_cast<const uint8_t*>(tile);
    for (int at = 0; at < g.width; at += 4)
        for (int r = 0; r < Q; ++r) {
            const int8_t* a = q + r * g.ldq + at;
            for (int i = 0; i < kCurTile; ++i) {
                const uint8_t* b = values + at * kCurTile + i * 4;
                products[r][i] += a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
            }
        }
#endif
}

template <int Q, bool Scaled>
INLINE bool int8_tile(const CurScan& g, int64_t tile, int query) {
    const char* p = g.tiles + tile * g.tile_bytes;
    int32_t products[Q][kCurTile];
    int8_products<Q>(g, p, static_cast<const int8_t*>(g.q) + query * g.ldq, products);
    const int64_t item = tile * kCurTile;
    bool full = false;
    for (int at = 0; at < kCurTile && item + at < g.count; at += VL) {
        const int lanes = g.count - item - at < VL ? static_cast<int>(g.count - item - at) : VL;
        const vf norm = norms_of(g, p, at), residual = residuals_of(g, p, at);
        const vf scale = Scaled ? scales_of(g, item + at, lanes) : splat(1.0f);
        for (int r = 0; r < Q; ++r) {
            const vf product = __builtin_convertvector(load_as<vi>(products[r] + at) + g.start[query + r], vf);
            full |= keep<Scaled>(g, query + r, product, norm, residual, scale, item + at, (1u << lanes) - 1);
        }
    }
    return full;
}

template <bool Scaled>
INLINE bool int8_queries(const CurScan& g, int64_t tile) {
    constexpr int kQueries = 2;
    bool full = false;
    int query = 0;
    for (; query + kQueries <= g.queries; query += kQueries) full |= int8_tile<kQueries, Scaled>(g, tile, query);
    for (; query < g.queries; ++query) full |= int8_tile<1, Scaled>(g, tile, query);
    return full;
}

template <bool Scaled>
INLINE int64_t int8_scan(const CurScan& g, int64_t tile, int64_t end) {
    for (bool full = false; tile < end && !full; ++tile) {
        full = int8_queries<Scaled>(g, tile);
        if (g.apart > 0) full |= int8_queries<Scaled>(g, tile + g.apart);
    }
    return tile;
}
#else
#include "cur_topk/cur_topk_avx512.inl"
#endif

// A tile of 16 float32 or bfloat16 items with Q queries: four items at a time, summed along the width.
template <int Q, bool Wide>
INLINE bool float_tile(const CurScan& g, int64_t tile, int query) {
    constexpr int kItems = 4;
    const char* p = g.tiles + tile * g.tile_bytes;
    const float* q = static_cast<const float*>(g.q) + query * g.ldq;
    float products[Q][kCurTile];
    for (int i = 0; i < kCurTile; i += kItems) {
        vf sum[Q][kItems] = {};
        for (int at = 0; at < g.width; at += VL) {
            vf x[kItems];
            for (int j = 0; j < kItems; ++j) {
                const int64_t value = static_cast<int64_t>(i + j) * g.width + at;
                if constexpr (Wide)
                    x[j] = load(reinterpret_cast<const float*>(p) + value);
                else
                    x[j] = widen_bf16(reinterpret_cast<const uint16_t*>(p) + value);
            }
            for (int r = 0; r < Q; ++r) {
                const vf a = load(q + r * g.ldq + at);
                for (int j = 0; j < kItems; ++j) sum[r][j] += x[j] * a;
            }
        }
        for (int r = 0; r < Q; ++r)
            for (int j = 0; j < kItems; ++j) products[r][i + j] = reduce_add(sum[r][j]);
    }
    const int64_t item = tile * kCurTile;
    bool full = false;
    for (int at = 0; at < kCurTile && item + at < g.count; at += VL) {
        const int lanes = g.count - item - at < VL ? static_cast<int>(g.count - item - at) : VL;
        const vf norm = norms_of(g, p, at);
        for (int r = 0; r < Q; ++r)
            full |= keep<false>(g, query + r, load(products[r] + at), norm, vf{}, norm, item + at, (1u << lanes) - 1);
    }
    return full;
}

template <bool Wide>
INLINE bool float_queries(const CurScan& g, int64_t tile) {
    constexpr int kQueries = VL == 16 ? 4 : 2;
    bool full = false;
    int query = 0;
    for (; query + kQueries <= g.queries; query += kQueries) full |= float_tile<kQueries, Wide>(g, tile, query);
    for (; query < g.queries; ++query) full |= float_tile<1, Wide>(g, tile, query);
    return full;
}

template <bool Wide>
INLINE int64_t float_scan(const CurScan& g, int64_t tile, int64_t end) {
    for (bool full = false; tile < end && !full; ++tile) {
        full = float_queries<Wide>(g, tile);
        if (g.apart > 0) full |= float_queries<Wide>(g, tile + g.apart);
    }
    return tile;
}

// Scans the tiles [begin, end), each together with the one `apart` behind it, until a reservoir is full. Returns where
// it stopped.
int64_t cur_scan(const CurScan& g, int64_t begin, int64_t end) {
    if (g.storage == Precision::kFloat32) return float_scan<true>(g, begin, end);
    if (g.storage == Precision::kBFloat16) return float_scan<false>(g, begin, end);
    return g.scale ? int8_scan<true>(g, begin, end) : int8_scan<false>(g, begin, end);
}

// Eight partial sums in float64, in the same order at every level. A product of two float32 is exact in float64, so it
// makes no difference whether it is fused; a product of a float32, a scale and an int8 is nearly exact.
typedef double vd __attribute__((vector_size(64)));
INLINE double sum_of(vd s) { return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])); }

double cur_exact(Precision storage, const char* tile, int lane, int64_t values, const double* q, const char* next) {
    const auto fetch = [&](int64_t bytes) {
#if defined(__GNUC__)
        __builtin_prefetch(next + bytes, 0, 2);  // into the second-level cache, which can wait for more lines at once
#else
        (void)bytes;
#endif
    };
    typedef int32_t vi8 __attribute__((vector_size(32)));
    typedef uint32_t vu8 __attribute__((vector_size(32)));
    typedef float vf8 __attribute__((vector_size(32)));
    typedef uint8_t vb8 __attribute__((vector_size(8)));
    typedef uint16_t vh8 __attribute__((vector_size(16)));
    vd sum = {};
    if (storage == Precision::kInt8) {
        const char* v = tile + lane * 4;
        for (int64_t i = 0; i < values; i += 8, v += 128) {
            fetch(i * 16), fetch(i * 16 + 64);
            const uint64_t low = load_as<uint32_t>(v);
            const uint64_t high = i + 4 < values ? load_as<uint32_t>(v + 64) : 0x80808080u;  // zeros, as stored
            const uint64_t both = low | high << 32;
            const vi8 x = __builtin_convertvector(load_as<vb8>(&both), vi8) - 128;
            sum += load_as<vd>(q + i) * __builtin_convertvector(x, vd);
        }
    } else if (storage == Precision::kFloat32) {
        const float* v = reinterpret_cast<const float*>(tile) + lane * values;
        for (int64_t i = 0; i < values; i += 8) {
            if (i % 16 == 0) fetch(i * 4);
            sum += load_as<vd>(q + i) * __builtin_convertvector(load_as<vf8>(v + i), vd);
        }
    } else {
        const uint16_t* v = reinterpret_cast<const uint16_t*>(tile) + lane * values;
        for (int64_t i = 0; i < values; i += 8) {
            if (i % 32 == 0) fetch(i * 2);
            const vf8 x = (vf8)(__builtin_convertvector(load_as<vh8>(v + i), vu8) << 16);
            sum += load_as<vd>(q + i) * __builtin_convertvector(x, vd);
        }
    }
    return sum_of(sum);
}

// Bisects on the values' bits, mapped to integers in the order of the values. No branch is hard to predict.
float kth_largest(const float* values, int n, int k) {
    constexpr uint32_t kSign = 0x80000000u;
    uint32_t found = 0;
    for (uint32_t bit = kSign; bit; bit >>= 1) {
        const uint32_t tried = found | bit;
        // Order as signed integers: for a negative float, all bits except the sign are inverted.
        const vi least = splat_int(static_cast<int32_t>(tried ^ kSign));
        vi count = vi{};
        int i = 0;
        for (; i + VL <= n; i += VL) {
            const vi bits = load_as<vi>(values + i);
            count -= (bits ^ (vi)((vu)(bits >> 31) >> 1)) >= least;
        }
        int total = 0;
        for (int j = 0; j < VL; ++j) total += count[j];
        for (; i < n; ++i) {
            const int32_t bits = load_as<int32_t>(values + i);
            total += (bits ^ static_cast<int32_t>(static_cast<uint32_t>(bits >> 31) >> 1)) >= least[0];
        }
        if (total >= k) found = tried;
    }
    const uint32_t ordered = found ^ kSign;
    const uint32_t bits = ordered & kSign ? ordered ^ ~kSign : ordered;
    return load_as<float>(&bits);
}
