// The scan of int8 items with 512-bit vectors: blocks of tiles against blocks of queries. The sums of a block go through
// the nearest cache to a test on integers, which nearly all fail; what passes is looked at with its own bounds.
//
// The items are the unsigned operand and the query the signed one, so that what the items' offset of 128 adds to a
// product is one number for each query, its start.
constexpr int kCurQueries = 256;  // that share a pass at most

// Thresholds on sums without their start: an item of tile v that query r wants has a sum above sum[v][r].
template <int V>
struct alignas(64) SumLimits {
    int32_t sum[V][kCurQueries];
};

// Lanes from `lanes` on repeat lane 0, so that extremes of a tile are those of its items.
INLINE vf items_only(vf x, int lanes) {
    if (lanes >= VL) return x;
    return (vf)_mm512_mask_blend_ps(static_cast<__mmask16>((1u << lanes) - 1), (__m512)splat(x[0]), (__m512)x);
}

// (sum + start + slack * norm + constant) * scale >= threshold, with the largest norm and the scale of the tile that
// allows most. Rounding is covered by a share of the threshold; 2^30 bounds what a start is taken from.
template <int V, bool Scaled>
INLINE void find_limits(const CurScan& g, const float* thresholds, int64_t tile, SumLimits<V>& limits) {
    for (int v = 0; v < V; ++v) {
        const int64_t item = (tile + v) * kCurTile;
        const int lanes = g.count - item < VL ? static_cast<int>(g.count - item) : VL;
        const float norm = reduce_max(items_only(norms_of(g, g.tiles + (tile + v) * g.tile_bytes, 0), lanes));
        float most = 1, least = 1;
        if (Scaled) {
            const vf scale = items_only(scales_of(g, item, lanes), lanes);
            most = 1 / reduce_max(scale), least = -1 / reduce_max(-scale);
        }
        for (int r = 0; r < g.queries; r += VL) {
            const vf threshold = load(thresholds + r);
            const vf allowing = threshold > 0.0f ? splat(most) : splat(least);
            const vf product = threshold * allowing;
            const vf room = vabs(product) * 0x1p-18f + (splat(norm) * load(g.slack + r) + load(g.constant + r)) + 2.0f;
            const vf limit = vmin(vmax(product - room, splat(-0x1p30f)), splat(0x1p30f));
            store_as(limits.sum[v] + r, (vi)_mm512_cvttps_epi32((__m512)limit) - load_as<vi>(g.start + r));
        }
    }
}

// Sums (Q, ld) of V tiles with Q queries, in which tile v has the columns [16 v, 16 v + 16). True if some were kept.
template <int V, bool Scaled>
INLINE bool filter(const CurScan& g, const SumLimits<V>& limits, const int32_t* sums, int64_t ld, int64_t tile,
                   int query, int queries) {
    bool any = false;
    for (int r = 0; r < queries; ++r) {
        __mmask16 passing[V];
        for (int v = 0; v < V; ++v)
            passing[v] = _mm512_cmpgt_epi32_mask((__m512i)load_as<vi>(sums + r * ld + v * VL),
                                                 _mm512_set1_epi32(limits.sum[v][query + r]));
        unsigned all = 0;
        for (int v = 0; v < V; ++v) all |= passing[v];
        if (__builtin_expect(all == 0, 1)) continue;
        any = true;
        for (int v = 0; v < V; ++v) {
            const int64_t item = (tile + v) * kCurTile;
            if (!passing[v] || item >= g.count) continue;
            const int lanes = g.count - item < VL ? static_cast<int>(g.count - item) : VL;
            const vi sum = load_as<vi>(sums + r * ld + v * VL) + g.start[query + r];
            keep<Scaled>(g, query + r, __builtin_convertvector(sum, vf),
                         norms_of(g, g.tiles + (tile + v) * g.tile_bytes, 0),
                         Scaled ? scales_of(g, item, lanes) : splat(1.0f), item, (1u << lanes) - 1);
        }
    }
    return any;
}

// V tiles with Q queries: Q * V accumulators.
template <int Q, int V>
INLINE void vnni_sums(const CurScan& g, const char* p, const int8_t* q, int32_t* sums) {
    vi sum[Q][V];
    UNROLL16 for (int r = 0; r < Q; ++r) {
        UNROLL16 for (int v = 0; v < V; ++v) sum[r][v] = vi{};
    }
    const char *p1 = p + g.tile_bytes, *p2 = p1 + g.tile_bytes;
    for (int at = 0; at < g.width; at += 4) {
        vi b[V];
        b[0] = load_as<vi>(p + at * kCurTile);
        if constexpr (V > 1) b[1] = load_as<vi>(p1 + at * kCurTile);
        if constexpr (V > 2) b[2] = load_as<vi>(p2 + at * kCurTile);
        UNROLL16 for (int r = 0; r < Q; ++r) {
            const vi a = splat_int(load_as<int32_t>(q + r * g.ldq + at));
            UNROLL16 for (int v = 0; v < V; ++v) S8::dot(sum[r][v], b[v], a);
        }
    }
    UNROLL16 for (int r = 0; r < Q; ++r) {
        UNROLL16 for (int v = 0; v < V; ++v) store_as(sums + (r * V + v) * VL, sum[r][v]);
    }
}

// One query at a time, each item by its own bounds: where few queries share a tile, the memory is what is waited for.
template <int V, bool Scaled>
INLINE void few_queries(const CurScan& g, int64_t tile) {
    const char* p = g.tiles + tile * g.tile_bytes;
    for (int query = 0; query < g.queries; ++query) {
        alignas(64) int32_t sums[V * VL];
        vnni_sums<1, V>(g, p, static_cast<const int8_t*>(g.q) + query * g.ldq, sums);
        for (int v = 0; v < V; ++v) {
            const int64_t item = (tile + v) * kCurTile;
            const int lanes = g.count - item < VL ? static_cast<int>(g.count - item) : VL;
            const vi sum = load_as<vi>(sums + v * VL) + g.start[query];
            keep<Scaled>(g, query, __builtin_convertvector(sum, vf), norms_of(g, p + v * g.tile_bytes, 0),
                         Scaled ? scales_of(g, item, lanes) : splat(1.0f), item, (1u << lanes) - 1);
        }
    }
}

template <int V, bool Scaled>
INLINE bool vnni_block(const CurScan& g, const float* thresholds, int64_t tile) {
    if (g.queries < 4) {
        few_queries<V, Scaled>(g, tile);
        return true;
    }
    const char* p = g.tiles + tile * g.tile_bytes;
    SumLimits<V> limits;
    find_limits<V, Scaled>(g, thresholds, tile, limits);
    alignas(64) int32_t sums[8 * V * VL];
    bool any = false;
    for (int query = 0; query < g.queries; query += 8) {  // rows beyond the queries are zero
        const int8_t* q = static_cast<const int8_t*>(g.q) + query * g.ldq;
        const int queries = g.queries - query < 8 ? g.queries - query : 8;
        if (queries > 4)
            vnni_sums<8, V>(g, p, q, sums);
        else
            vnni_sums<4, V>(g, p, q, sums);
        any |= filter<V, Scaled>(g, limits, sums, V * VL, tile, query, queries);
    }
    return any;
}

#if defined(__AMX_INT8__)
// Eight tile registers: sums of 2 x 16 queries with 2 x 16 items, two of queries, two of items. A tile of items in
// memory is what the instruction reads: 16 rows of 64 bytes for 64 values. A width that is no multiple of 64 reads on
// into what follows, which meets zeros of the query.
constexpr int kAmxTiles = 2, kAmxQueries = 32;
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

template <bool Scaled>
INLINE bool amx_block(const CurScan& g, const float* thresholds, int64_t tile) {
    const char* p = g.tiles + tile * g.tile_bytes;
    const char* ahead = p + kAmxTiles * g.tile_bytes;  // the next block is fetched while this one is multiplied
    SumLimits<kAmxTiles> limits;
    find_limits<kAmxTiles, Scaled>(g, thresholds, tile, limits);
    alignas(64) int32_t sums[kAmxQueries * kAmxTiles * VL];
    constexpr int kRow = kAmxTiles * VL;
    bool any = false;
    for (int query = 0; query < g.queries; query += kAmxQueries) {
        const int8_t* q = static_cast<const int8_t*>(g.q) + query * g.ldq;
        const bool both = g.queries - query > 16;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int at = 0; at < g.width; at += 64) {
            if (query == 0)
                UNROLL16 for (int i = 0; i < 32; ++i)
                    _mm_prefetch(ahead + (at * 2) * kCurTile + i * 64, _MM_HINT_T0);
            _tile_loadd(6, p + at * kCurTile, 64);
            _tile_loadd(4, q + at, g.ldq);
            _tile_loadd(7, p + g.tile_bytes + at * kCurTile, 64);
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
            if (both) {
                _tile_loadd(5, q + 16 * g.ldq + at, g.ldq);
                _tile_dpbsud(2, 5, 6);
                _tile_dpbsud(3, 5, 7);
            }
        }
        _tile_stored(0, sums, kRow * 4);
        _tile_stored(1, sums + VL, kRow * 4);
        if (both) {
            _tile_stored(2, sums + 16 * kRow, kRow * 4);
            _tile_stored(3, sums + 16 * kRow + VL, kRow * 4);
        }
        const int queries = g.queries - query < kAmxQueries ? g.queries - query : kAmxQueries;
        any |= filter<kAmxTiles, Scaled>(g, limits, sums, kRow, tile, query, queries);
    }
    return any;
}
#endif

template <bool Scaled>
int64_t int8_scan(const CurScan& g, int64_t begin, int64_t end) {
    alignas(64) float thresholds[kCurQueries];
    for (int r = 0; r < g.queries; ++r) thresholds[r] = g.reservoirs[r].threshold;
    for (int r = g.queries; r % VL; ++r) thresholds[r] = 0;
    bool full = false;
#if defined(__AMX_INT8__)
    const bool tiles = g.queries > 4;
    const TileConfig config;
    if (tiles) _tile_loadconfig(&config);
    // The last tile of a shard has nothing behind it that might be read.
    const int64_t whole = (g.count - 1) / kCurTile;
#endif
    while (begin < end && !full) {
        bool any;
#if defined(__AMX_INT8__)
        if (tiles && begin + kAmxTiles <= (g.width % 64 ? (end < whole ? end : whole) : end)) {
            any = amx_block<Scaled>(g, thresholds, begin);
            begin += kAmxTiles;
        } else
#endif
            if (begin + 3 <= end) {
            any = vnni_block<3, Scaled>(g, thresholds, begin);
            begin += 3;
        } else {
            any = vnni_block<1, Scaled>(g, thresholds, begin);
            begin += 1;
        }
        if (any)
            for (int query = 0; query < g.queries; ++query)
                full |= g.reservoirs[query].count > g.reservoirs[query].limit;
    }
#if defined(__AMX_INT8__)
    if (tiles) _tile_release();
#endif
    return begin;
}
