// The scan of int8 items with 512-bit vectors: pairs of tiles against blocks of queries. The sums of a block go through
// the nearest cache to a test that nearly all fail; what passes is looked at with its own bounds.
//
// The items are the unsigned operand and the query the signed one, so that what the items' offset of 128 adds to a
// product is one number for each query, its start.
constexpr int kCurQueries = 256;  // that share a pass at most

// A sum of query r without its start is looked at from
//   reach[r] / scale - room[r] - slack[r] * norm - spread[r] * residual
// on, with the item's scale, norm and residual. reach and room leave space for the rounding of either side.
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

// A tile of each run (V = 2) or one alone, and what bounds its items' scores.
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
        // The inverse of a scale below 2^-128 overflows and becomes NaN: such items pass every bound.
        t.inverse[v] = 1.0f / t.scale[v];
        t.inverse[v] += t.inverse[v] - t.inverse[v];
    }
}

// Sums (V, VL) of one query, from which its candidates are kept. True if its reservoir is full.
template <int V, bool Scaled>
INLINE bool filter(const CurScan& g, const Limits& limits, const Tiles<V, Scaled>& t, const int32_t* sums, int query) {
    const vf reach = splat(limits.reach[query]), room = splat(limits.room[query]);
    const vf slack = splat(g.slack[query]), spread = splat(g.spread[query]);
    unsigned passing[V], all = 0;
    UNROLL16 for (int v = 0; v < V; ++v) {
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

// V tiles with Q queries: Q * V accumulators. Ahead: with each line that is read, that of the next tile is fetched.
template <int Q, int V, bool Ahead>
INLINE void vnni_sums(const CurScan& g, const char* const* p, const int8_t* q, int32_t* sums) {
    vi sum[Q][V];
    UNROLL16 for (int r = 0; r < Q; ++r) {
        UNROLL16 for (int v = 0; v < V; ++v) sum[r][v] = vi{};
    }
    for (int at = 0; at < g.width; at += 4) {
        vi b[V];
        UNROLL16 for (int v = 0; v < V; ++v) {
            b[v] = load_as<vi>(p[v] + at * kCurTile);
            if (Ahead) _mm_prefetch(p[v] + g.tile_bytes + at * kCurTile, _MM_HINT_T0);
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

#if defined(__AMX_INT8__)
// Eight tile registers: sums of 2 x 16 queries with 2 x 16 items, two of queries, two of items. A tile of items in
// memory is what the instruction reads: 16 rows of 64 bytes for 64 values. A width that is no multiple of 64 reads on
// into what follows, which meets zeros of the query.
constexpr int kAmxQueries = 32;
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A core waits where more lines are on their way than it has buffers for, and the memory where there are fewer: so what
// is fetched and the test of the pair of tiles before are shared out evenly over a pair's products. Of tiles further on
// than the next the nearest cache would hold too few.
template <bool Scaled>
INLINE bool amx_scan(const CurScan& g, const Limits& limits, int64_t& tile, int64_t end) {
    static const TileConfig config;  // in memory whole: the intrinsic names its first word only
    _tile_loadconfig(&config);
    constexpr int kRow = 2 * VL, kParts = 8;  // of 64 values' products
    alignas(64) int32_t sums[kAmxQueries * kRow];  // of the pair before, until they are tested, and then of this one
    const int parts = (g.width + 63) / 64 * kParts;
    Tiles<2, Scaled> before;
    int waiting = 0, first = 0;  // queries whose sums wait to be tested, the first of them
    bool full = false;
    for (; tile < end && !full; ++tile) {
        Tiles<2, Scaled> now;
        const char *p = g.tiles + tile * g.tile_bytes, *p1 = p + g.apart * g.tile_bytes;
        const bool last = tile + 1 == end;
        const char *next = last ? g.then[0] : p + g.tile_bytes, *next1 = last ? g.then[1] : p1 + g.tile_bytes;
        for (int query = 0; query < g.queries; query += kAmxQueries) {
            const int8_t* q = static_cast<const int8_t*>(g.q) + query * g.ldq;
            const bool both = g.queries - query > 16;
            const int each = (waiting + parts - 1) / parts;
            int row = 0;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int at = 0; at < g.width; at += 64) {
                _tile_loadd(6, p + at * kCurTile, 64);
                _tile_loadd(4, q + at, g.ldq);
                _tile_dpbsud(0, 4, 6);
                _tile_loadd(7, p1 + at * kCurTile, 64);
                _tile_dpbsud(1, 4, 7);
                if (both) {
                    _tile_loadd(5, q + 16 * g.ldq + at, g.ldq);
                    _tile_dpbsud(2, 5, 6);
                    _tile_dpbsud(3, 5, 7);
                }
                for (int part = 0; part < kParts; ++part) {
                    if (query == 0) {
                        const int64_t line = at * kCurTile + part * 128;
                        _mm_prefetch(next + line, _MM_HINT_T0);
                        _mm_prefetch(next1 + line, _MM_HINT_T0);
                        _mm_prefetch(next + line + 64, _MM_HINT_T0);
                        _mm_prefetch(next1 + line + 64, _MM_HINT_T0);
                    }
                    for (int i = 0; i < each && row < waiting; ++i, ++row)
                        full |= filter<2, Scaled>(g, limits, before, sums + row * kRow, first + row);
                }
            }
            _tile_stored(0, sums, kRow * 4);
            _tile_stored(1, sums + VL, kRow * 4);
            if (both) {
                _tile_stored(2, sums + 16 * kRow, kRow * 4);
                _tile_stored(3, sums + 16 * kRow + VL, kRow * 4);
            }
            if (query == 0) {
                _mm_prefetch(next + g.tile_bytes - 64, _MM_HINT_T0);
                _mm_prefetch(next1 + g.tile_bytes - 64, _MM_HINT_T0);
                if (Scaled) {
                    _mm_prefetch(g.scale + (tile + 1) * kCurTile + VL - 1, _MM_HINT_T0);
                    _mm_prefetch(g.scale + (tile + g.apart + 1) * kCurTile + VL - 1, _MM_HINT_T0);
                }
                read_tiles(g, tile, now);
            }
            before = now, first = query;
            waiting = g.queries - query < kAmxQueries ? g.queries - query : kAmxQueries;
        }
    }
    for (int row = 0; row < waiting; ++row)
        full |= filter<2, Scaled>(g, limits, before, sums + row * kRow, first + row);
    _tile_release();
    return full;
}
#endif

template <bool Scaled>
int64_t int8_scan(const CurScan& g, int64_t tile, int64_t end) {
    Limits limits;
    find_limits(g, limits);
    bool full = false;
#if defined(__AMX_INT8__)
    if (g.queries > 4 && g.apart > 0) {
        // The last tiles of a shard have too little behind them that might be read: products read 1024 bytes at a time.
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
