// The scan of int8 items with 512-bit vectors: pairs of tiles and blocks of queries. The sums of a block pass through
// the first-level cache to a quick test, which nearly all fail. Items that pass are tested again with their own bounds.
//
// The items are the unsigned operand and the query is the signed one. The items' offset of 128 then adds one number to
// all products of a query, which its `start` takes off.
constexpr int kCurQueries = 256;  // the most that share a pass

// A sum of query r, without its start, passes the quick test from reach[r] / scale - room[r] - slack[r] * norm -
// spread[r] * residual on, with the item's scale, norm and residual. reach and room include the rounding of both sides.
struct alignas(64) Limits {
    float reach[kCurQueries], room[kCurQueries];
};

INLINE void find_limits(const CurScan& g, Limits& limits) {
    const float rounding = static_cast<float>(g.width) * (255 * 127) * 0x1p-21f;
    for (int r = 0; r < g.queries; ++r) {
        const float threshold = g.reservoirs[r].threshold;
        limits.reach[r] = threshold - __builtin_fabsf(threshold) * 0x1p-20f;
        limits.room[r] = g.constant[r] + rounding + static_cast<float>(g.start[r]);
    }
}

// A tile of each half of a run (V = 2), or one tile, and the error bounds of its items.
template <int V, bool Scaled>
struct Tiles {
    const char* p[V];
    int64_t item[V];
    int lanes[V];
    vf norm[V], residual[V], scale[V], inverse[V];
};

template <int V, bool Scaled>
INLINE void read_tiles(const CurScan& g, int64_t tile, Tiles<V, Scaled>& t) {
    for (int v = 0; v < V; ++v) {
        t.p[v] = g.tiles + (tile + v * g.apart) * g.tile_bytes;
        t.item[v] = (tile + v * g.apart) * kCurTile;
        t.lanes[v] = g.count - t.item[v] < VL ? static_cast<int>(g.count - t.item[v]) : VL;
        t.norm[v] = norms_of(g, t.p[v], 0), t.residual[v] = residuals_of(g, t.p[v], 0);
        t.scale[v] = splat(1.0f);
        if (!Scaled) continue;
        t.scale[v] = scales_of(g, t.item[v], t.lanes[v]);
        // The inverse of a scale below 2^-128 overflows, and the next line makes it NaN, so that such items pass the
        // test.
        t.inverse[v] = 1.0f / t.scale[v];
        t.inverse[v] += t.inverse[v] - t.inverse[v];
    }
}

// Tests the sums (V, VL) of one query and keeps its candidates. Returns true if its reservoir is full.
template <int V, bool Scaled>
INLINE bool filter(const CurScan& g, const Limits& limits, const Tiles<V, Scaled>& t, const int32_t* sums, int query) {
    const vf reach = splat(limits.reach[query]), room = splat(limits.room[query]);
    const vf slack = splat(g.slack[query]), spread = splat(g.spread[query]);
    unsigned passing[V], all = 0;
    UNROLL for (int v = 0; v < V; ++v) {
        const vf sum = __builtin_convertvector(load_as<vi>(sums + v * VL), vf);
        const vf least = (Scaled ? reach * t.inverse[v] : reach) - room;
        passing[v] = not_below(sum, least - slack * t.norm[v] - spread * t.residual[v]);
        all |= passing[v];
    }
    if (__builtin_expect(all == 0, 1)) return false;
    bool full = false;
    for (int v = 0; v < V; ++v) {
        if (!passing[v]) continue;
        const vi sum = load_as<vi>(sums + v * VL) + g.start[query];
        full |= keep<Scaled>(g, query, __builtin_convertvector(sum, vf), t.norm[v], t.residual[v], t.scale[v],
                             t.item[v], (1u << t.lanes[v]) - 1);
    }
    return full;
}

// Products of V tiles with Q queries in Q * V accumulators. Ahead: with each cache line, that of the next tile is
// prefetched.
template <int Q, int V, bool Ahead>
INLINE void vnni_sums(const CurScan& g, const char* const* p, const int8_t* q, int32_t* sums) {
    vi sum[Q][V];
    UNROLL for (int r = 0; r < Q; ++r) {
        UNROLL for (int v = 0; v < V; ++v) sum[r][v] = vi{};
    }
    for (int at = 0; at < g.width; at += 4) {
        vi b[V];
        UNROLL for (int v = 0; v < V; ++v) {
            b[v] = load_as<vi>(p[v] + at * kCurTile);
            if (Ahead) _mm_prefetch(p[v] + g.tile_bytes + at * kCurTile, _MM_HINT_T0);
        }
        UNROLL for (int r = 0; r < Q; ++r) {
            const vi a = splat_int(load_as<int32_t>(q + r * g.ldq + at));
            UNROLL for (int v = 0; v < V; ++v) S8::dot(sum[r][v], b[v], a);
        }
    }
    UNROLL for (int r = 0; r < Q; ++r) {
        UNROLL for (int v = 0; v < V; ++v) store_as(sums + (r * V + v) * VL, sum[r][v]);
    }
}

template <int V, bool Scaled>
INLINE bool vnni_block(const CurScan& g, const Limits& limits, int64_t tile) {
    Tiles<V, Scaled> t;
    read_tiles(g, tile, t);
    alignas(64) int32_t sums[8 * V * VL];
    bool full = false;
    for (int query = 0; query < g.queries; query += 8) {  // rows beyond the queries are zero
        const int8_t* q = static_cast<const int8_t*>(g.q) + query * g.ldq;
        const int queries = g.queries - query < 8 ? g.queries - query : 8;
        if (queries == 1)
            vnni_sums<1, V, true>(g, t.p, q, sums);
        else if (queries <= 4)
            vnni_sums<4, V, true>(g, t.p, q, sums);
        else if (query == 0)
            vnni_sums<8, V, true>(g, t.p, q, sums);
        else
            vnni_sums<8, V, false>(g, t.p, q, sums);
        for (int r = 0; r < queries; ++r)
            full |= filter<V, Scaled>(g, limits, t, sums + r * V * VL, query + r);
    }
    return full;
}

#ifdef FASTRERANK_TILES
#include "cur_topk/cur_topk_amx.inl"
#endif

template <bool Scaled>
int64_t int8_scan(const CurScan& g, int64_t tile, int64_t end) {
    Limits limits;
    find_limits(g, limits);
    bool full = false;
#ifdef FASTRERANK_TILES
    if (g.queries > 4 && g.apart > 0) {
        // Products read 1024 bytes at a time, which reaches beyond the last tiles of a shard. Those are scanned without
        // tiles.
        const int64_t over = (g.width + 63) / 64 * 1024 - g.tile_bytes;
        const int64_t short_of = over > 0 ? (over + g.tile_bytes - 1) / g.tile_bytes : 0;
        const int64_t whole = (g.count + kCurTile - 1) / kCurTile - short_of - g.apart;
        full = amx_scan<Scaled>(g, limits, tile, end < whole ? end : whole);
    }
#endif
    for (; tile < end && !full; ++tile)
        full = g.apart > 0 ? vnni_block<2, Scaled>(g, limits, tile) : vnni_block<1, Scaled>(g, limits, tile);
    return tile;
}
