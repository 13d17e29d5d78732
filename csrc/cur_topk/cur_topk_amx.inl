// The scan of int8 items on AMX tiles: four tile registers hold the sums of 32 queries with 32 items, two hold queries,
// two items. A tile of items in memory has the layout of a tile register: 16 rows of 64 bytes for 64 values. Where the
// width is not a multiple of 64, the load reads into the next tile, whose values are multiplied by zeros of the query.
constexpr int kAmxQueries = 32;

// With more cache lines in flight than a core has buffers, the core waits; with fewer, the memory idles. So prefetches,
// and the tests of the pair of tiles before, are spread evenly over a pair's products. Only the next pair is
// prefetched, because the first-level cache has no room for more.
template <bool Scaled>
INLINE bool amx_scan(const CurScan& g, const Limits& limits, int64_t& tile, int64_t end) {
    configure_tiles();
    constexpr int kRow = 2 * VL, kParts = 8;  // parts of the products of 64 values
    alignas(64) int32_t sums[kAmxQueries * kRow];  // of the pair before until they are tested, then of this pair
    const int parts = (g.width + 63) / 64 * kParts;
    Tiles<2, Scaled> before;
    int waiting = 0, first = 0;  // number and first of the queries whose sums are not yet tested
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
            Tile<0>::zero();
            Tile<1>::zero();
            Tile<2>::zero();
            Tile<3>::zero();
            for (int at = 0; at < g.width; at += 64) {
                Tile<6>::load(p + at * kCurTile, 64);
                Tile<4>::load(q + at, g.ldq);
                tile_product_s8u8<0, 4, 6>();
                Tile<7>::load(p1 + at * kCurTile, 64);
                tile_product_s8u8<1, 4, 7>();
                if (both) {
                    Tile<5>::load(q + 16 * g.ldq + at, g.ldq);
                    tile_product_s8u8<2, 5, 6>();
                    tile_product_s8u8<3, 5, 7>();
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
            Tile<0>::store(sums, kRow * 4);
            Tile<1>::store(sums + VL, kRow * 4);
            if (both) {
                Tile<2>::store(sums + 16 * kRow, kRow * 4);
                Tile<3>::store(sums + 16 * kRow + VL, kRow * 4);
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
    release_tiles();
    return full;
}
