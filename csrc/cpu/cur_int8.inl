// The scan of int8 items with 512-bit vectors: blocks of tiles against blocks of queries. The sums of a block go
// through the nearest cache to a test on integers, which nearly all fail; what passes is looked at with its own bounds.
//
// The items are the unsigned operand and the query the signed one, so that what the items' offset of 128 adds to a
// product is one number for each query, its start.
constexpr int kCurQueries = 256;  // that share a pass at most

// What a sum without its start must reach to be looked at: threshold[r] * inverse[v][i] - room[r], with the norms of a
// block at their largest, and rounding covered.
template <int V>
struct alignas(64) Limits {
    float room[kCurQueries];
    vf inverse[V], scale[V];
    int lanes[V];
};

template <int V, bool Scaled>
INLINE void find_limits(const CurScan& g, const float* thresholds, int64_t tile, Limits<V>& limits) {
    vf norm = vf{}, residual = vf{}, largest = vf{};
    for (int v = 0; v < V; ++v) {
        const int64_t item = (tile + v) * kCurTile;
        limits.lanes[v] = g.count - item < VL ? static_cast<int>(g.count - item) : VL;
        limits.scale[v] = Scaled ? scales_of(g, item, limits.lanes[v]) : splat(1.0f);
        limits.inverse[v] = 1.0f / limits.scale[v];
        norm = vmax(norm, norms_of(g, g.tiles + (tile + v) * g.tile_bytes, 0));
        residual = vmax(residual, residuals_of(g, g.tiles + (tile + v) * g.tile_bytes, 0));
        largest = vmax(largest, limits.inverse[v]);
    }
    const vf most = splat(reduce_max(norm)), furthest = splat(reduce_max(residual));
    const vf share = splat(reduce_max(largest) * 0x1p-20f);
    const float rounding = static_cast<float>(g.width) * (255 * 127) * 0x1p-21f;
    for (int r = 0; r < g.queries; r += VL) {
        const vf covered = vabs(load(thresholds + r)) * share + rounding;
        const vf bound = most * load(g.slack + r) + furthest * load(g.spread + r) + load(g.constant + r);
        store(limits.room + r, bound + covered + __builtin_convertvector(load_as<vi>(g.start + r), vf));
    }
}

// Sums (Q, ld) of V tiles with Q queries, in which tile v has the columns [16 v, 16 v + 16). True if some were kept.
// Ahead: two lines from `next` on are fetched with each query.
template <int V, bool Scaled, bool Ahead>
INLINE bool filter(const CurScan& g, const Limits<V>& limits, const float* thresholds, const int32_t* sums, int64_t ld,
                   int64_t tile, int query, int queries, const char* next) {
    bool any = false;
    for (int r = 0; r < queries; ++r) {
        if constexpr (Ahead) {
            _mm_prefetch(next + r * 128, _MM_HINT_T0);
            _mm_prefetch(next + r * 128 + 64, _MM_HINT_T0);
        }
        const vf threshold = splat(thresholds[query + r]), room = splat(limits.room[query + r]);
        unsigned passing[V], all = 0;
    UNROLL16 for (int v = 0; v < V; ++v) {
            const vf sum = __builtin_convertvector(load_as<vi>(sums + r * ld + v * VL), vf);
            passing[v] = not_below(sum, threshold * limits.inverse[v] - room);
            all |= passing[v];
        }
        if (__builtin_expect(all == 0, 1)) continue;
        any = true;
        for (int v = 0; v < V; ++v) {
            if (!passing[v] || limits.lanes[v] <= 0) continue;
            const vi sum = load_as<vi>(sums + r * ld + v * VL) + g.start[query + r];
            const char* p = g.tiles + (tile + v) * g.tile_bytes;
            keep<Scaled>(g, query + r, __builtin_convertvector(sum, vf), norms_of(g, p, 0), residuals_of(g, p, 0),
                         limits.scale[v], (tile + v) * kCurTile, (1u << limits.lanes[v]) - 1);
        }
    }
    return any;
}

// V tiles with Q queries: Q * V accumulators.
template <int Q, int V, bool Ahead>
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
        if constexpr (Ahead) {  // the next block, while this one is multiplied
            UNROLL16 for (int v = 0; v < V; ++v)
                _mm_prefetch(p + V * g.tile_bytes + (at * V + v * 4) * kCurTile, _MM_HINT_T0);
        }
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
        vnni_sums<1, V, false>(g, p, static_cast<const int8_t*>(g.q) + query * g.ldq, sums);
        for (int v = 0; v < V; ++v) {
            const int64_t item = (tile + v) * kCurTile;
            const int lanes = g.count - item < VL ? static_cast<int>(g.count - item) : VL;
            const vi sum = load_as<vi>(sums + v * VL) + g.start[query];
            keep<Scaled>(g, query, __builtin_convertvector(sum, vf), norms_of(g, p + v * g.tile_bytes, 0),
                         residuals_of(g, p + v * g.tile_bytes, 0), Scaled ? scales_of(g, item, lanes) : splat(1.0f),
                         item, (1u << lanes) - 1);
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
    Limits<V> limits;
    find_limits<V, Scaled>(g, thresholds, tile, limits);
    alignas(64) int32_t sums[8 * V * VL];
    bool any = false;
    for (int query = 0; query < g.queries; query += 8) {  // rows beyond the queries are zero
        const int8_t* q = static_cast<const int8_t*>(g.q) + query * g.ldq;
        const int queries = g.queries - query < 8 ? g.queries - query : 8;
        if (queries <= 4)
            vnni_sums<4, V, false>(g, p, q, sums);
        else if (query == 0)
            vnni_sums<8, V, true>(g, p, q, sums);
        else
            vnni_sums<8, V, false>(g, p, q, sums);
        any |= filter<V, Scaled, false>(g, limits, thresholds, sums, V * VL, tile, query, queries, nullptr);
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

// 512 bytes of the next block: fetched while this one is multiplied, and few at a time, since a core waits where more
// lines are on their way than it has buffers for.
INLINE void fetch(const char* p) {
    UNROLL16 for (int i = 0; i < 8; ++i) _mm_prefetch(p + i * 64, _MM_HINT_T0);
}

template <bool Scaled>
INLINE bool amx_block(const CurScan& g, const float* thresholds, int64_t tile) {
    const char* p = g.tiles + tile * g.tile_bytes;
    const char* ahead = p + kAmxTiles * g.tile_bytes;
    Limits<kAmxTiles> limits;
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
            const char* next = ahead + at * kCurTile;
            _tile_loadd(6, p + at * kCurTile, 64);
            _tile_loadd(4, q + at, g.ldq);
            if (query == 0) fetch(next);
            _tile_dpbsud(0, 4, 6);
            _tile_loadd(7, p + g.tile_bytes + at * kCurTile, 64);
            _tile_dpbsud(1, 4, 7);
            if (query == 0) fetch(next + 512);
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
        if (query == 0) {
            // The memory is to be busy in the filter too: what it does not fetch of the second half is fetched here.
            const char* half = ahead + g.width * kCurTile;
            const char* next = ahead + kAmxTiles * g.tile_bytes - queries * 128;
            for (; half < next; half += 64) _mm_prefetch(half, _MM_HINT_T0);
            any |= filter<kAmxTiles, Scaled, true>(g, limits, thresholds, sums, kRow, tile, query, queries, half);
        } else {
            any |= filter<kAmxTiles, Scaled, false>(g, limits, thresholds, sums, kRow, tile, query, queries, nullptr);
        }
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
