// Attention by key intervals on AMX tiles, bfloat16. A tile of 16 queries and a block of keys take three passes over a
// buffer in the first-level cache: scores; weights in bfloat16, relative to the largest score so far; products of the
// weights with the values, and with ones, which give the weights' sums. The layouts of keys, values and weights are
// those of encoder/self_attention_amx.inl.
//
// A row's bits depend on that row alone for the reasons given in attention.inl. Largest scores (base 2) are rounded to
// integers, so that earlier sums are scaled by powers of two, without an error; a tile whose sums all keep their scale
// skips that pass.

// A multiple of 32: its scores and weights fit the first-level cache.
constexpr int kTileKeys = 256;
// Scores this large leave no bits for kBase, so their distance to the largest is rounded first.
constexpr float kLargeShift = 0x1p21f;

// The largest lane of each of 16 vectors, as one vector.
INLINE vf largest_lanes(const float* rows) {
    alignas(64) int32_t columns[256];
    transpose_block(reinterpret_cast<const char*>(rows), 64, 16, 16, columns, 16);
    vf m = load_as<vf>(columns);
    for (int i = 1; i < 16; ++i) m = vmax(m, load_as<vf>(columns + i * 16));
    return m;
}

struct TileAttention {
    const Attention& g;
    const int32_t *lo, *hi;  // of the list, by row
    const KeyRun& run_of_keys;
    int row_begin;  // row of query 0
    int key_begin, keys;  // the block
    int depth, tiles;  // steps of 32 dims, tiles of 16
    const char *q, *key_tiles, *value_tiles;
    float *acc, *m, *l;  // by query: sums of values, largest score (base 2) as an integer, sum of weights
    float* exact;  // sum of weights before they are rounded, or null if not wanted
    float* s;  // [kTileKeys / 16][16 queries][16 keys]
    char* p;  // [kTileKeys / 32] tiles
    float* tail;  // acc and l of a tile with fewer queries

    ALWAYS_INLINE int first_key(int row) const { return run_of_keys.joined() ? 0 : lo[row]; }
    ALWAYS_INLINE int end_key(int row) const {
        return run_of_keys.joined() ? hi[row] - run_of_keys.key_begin + run_of_keys.prefix_keys : hi[row];
    }

    const char* query_tiles(int query) const { return q + static_cast<int64_t>(query) * depth * 64; }

    // Scores of 32 keys. Uses tiles 0, 1, 4 and 5.
    ALWAYS_INLINE void multiply_keys(const char* a, int block) const {
        Tile<0>::zero();
        Tile<1>::zero();
        const int64_t next = static_cast<int64_t>(depth) * kTileSize;
        const char* b = key_tiles + block * 2 * next;
        for (int step = 0; step < depth; ++step, a += 64, b += kTileSize) {
            Tile<4>::load(a, depth * 64);
            Tile<5>::load(b, 64);
            tile_product<0, 4, 5>();
            Tile<5>::load(b + next, 64);
            tile_product<1, 4, 5>();
        }
        Tile<0>::store(s + block * 512, 64);
        Tile<1>::store(s + block * 512 + 256, 64);
    }

    // Caps a query's scores in the blocks [begin, end), and makes those outside the keys [a, b) -infinity. Returns the
    // largest of each lane.
    ALWAYS_INLINE vf prepare(float* x, int begin, int end, int a, int b) const {
        const vf outside = splat(-__builtin_inff());
        if (a > begin * 32 || b < end * 32) {
            const int whole_from = (a + 15) / 16, whole_to = b / 16;
            for (int t = begin * 2; t < end * 2; ++t) {
                if (t >= whole_from && t < whole_to) continue;
                const int from = a - t * 16, to = b - t * 16;
                const uint32_t above = from <= 0 ? 0xffffu : from >= 16 ? 0u : 0xffffu << from;
                const uint32_t below = to >= 16 ? 0xffffu : to <= 0 ? 0u : 0xffffu >> (16 - to);
                _mm512_mask_storeu_ps(x + t * 256, static_cast<__mmask16>(~(above & below)), (__m512)outside);
            }
        }
        if (g.softcap > 0) {
            const float inner = g.scale / g.softcap;
            for (int t = a / 16; t * 16 < b; ++t) {
                const vf y = load(x + t * 256);
                store(x + t * 256, y == outside ? y : tanhv(y * inner));
            }
        }
        vf even = load(x + begin * 512), odd = load(x + begin * 512 + 256);
        for (int t = begin + 1; t < end; ++t) {
            even = vmax(even, load(x + t * 512));
            odd = vmax(odd, load(x + t * 512 + 256));
        }
        return vmax(even, odd);
    }

    // A tile of queries between the passes: its queries, its blocks of 32 keys, and the largest score so far of each
    // query, which is subtracted from its scores.
    struct Queries {
        int first, rows, begin, end;
        uint32_t large;  // queries whose shift is beyond kLargeShift
        alignas(64) float shifts[16];
        alignas(64) float bases[16];  // kBase - shift
        bool any() const { return begin < end; }
    };

    ALWAYS_INLINE void place(Queries& x, int first, int rows) const {
        const int row = row_begin + first / g.group, last = row_begin + (first + rows - 1) / g.group;
        const int lowest = first_key(row) - key_begin, highest = end_key(last) - key_begin;
        x.first = first;
        x.rows = rows;
        x.begin = lowest < 0 ? 0 : lowest / 32;
        x.end = ((highest > keys ? keys : highest) + 31) / 32;
    }

    // Finds the shifts from the scores, and scales the sums so far to them.
    __attribute__((noinline)) void shift(Queries& x, float c) const {
        alignas(64) float most[256], shrinks[16];
        for (int i = x.rows; i < 16; ++i) store(most + i * 16, vf{});
        for (int i = 0; i < x.rows; ++i) {
            const int row = row_begin + (x.first + i) / g.group;
            const int from = first_key(row) - key_begin, to = end_key(row) - key_begin;
            store(most + i * 16, prepare(s + i * 16, x.begin, x.end, from < 0 ? 0 : from, to > keys ? keys : to));
        }
        const __mmask16 real = static_cast<__mmask16>((1u << x.rows) - 1);
        const vf none = splat(-__builtin_inff());
        const vf before = (vf)_mm512_maskz_loadu_ps(real, m + x.first);
        const vf now = vmax(round_nearest(largest_lanes(most) * c), before);
        const vf from = now == none ? vf{} : now;
        const vf shrink = now == before ? splat(1.0f) : exp2v<5>(before - from);
        _mm512_mask_storeu_ps(m + x.first, real, (__m512)now);
        store(x.shifts, from);
        store(x.bases, kBase - from);
        store(shrinks, shrink);
        x.large = _mm512_mask_cmp_ps_mask(real, (__m512)vabs(from), (__m512)splat(kLargeShift), _CMP_NLT_UQ);
        const int dims = tiles * 16;
        uint32_t less = _mm512_mask_cmp_ps_mask(real, (__m512)shrink, (__m512)splat(1.0f), _CMP_NEQ_UQ);
        for (; less; less &= less - 1) {
            const int i = __builtin_ctz(less);
            float* sums = acc + static_cast<int64_t>(x.first + i) * dims;
            for (int d = 0; d < dims; d += 16) store(sums + d, load(sums + d) * shrinks[i]);
            l[x.first + i] *= shrinks[i];
        }
        if (exact) add_exact(x, c, shrinks);
    }

    // Weights 2^(c score - shift + 1/2) as in tile_weight; those below 2^-62 are zeros. NaN stays NaN.
    static ALWAYS_INLINE vu weight(vf z, vf f) {
        constexpr float k = 1.4142135623730951f * 0x1p-64f;
        vf w = f * (0.055171623826026917f * k) + 0.2426111251115799f * k;
        w = w * f + 0.6932609677314758f * k;
        w = w * f + (0.9999280571937561f * k + 0x1p-72f);
        const __mmask16 counts = _mm512_cmp_ps_mask((__m512)z, (__m512)splat(kBase - 62.0f), _CMP_NLT_UQ);
        return (vu)_mm512_maskz_add_epi32(counts, (__m512i)w, _mm512_slli_epi32((__m512i)z, 23));
    }

    ALWAYS_INLINE void weigh(const Queries& x, int block, vf c) const {
        const float* from = s + block * 512;
        char* to = p + block * kTileSize;
        for (int i = 0; i < x.rows; ++i) {
            const vf base = splat(x.bases[i]), low = load(from + i * 16), high = load(from + 256 + i * 16);
            const vf z0 = low * c + base, z1 = high * c + base;
            store_as(to + i * 64, pair_weights(weight(z0, low * c - (z0 - base)), weight(z1, high * c - (z1 - base))));
        }
    }

    // The same for a query whose scores are beyond kLargeShift.
    __attribute__((noinline)) void weigh_large(const Queries& x, int block, int i, float c) const {
        vu w[2];
        for (int half = 0; half < 2; ++half) {
            const vf from = load(s + block * 512 + half * 256 + i * 16) * c - x.shifts[i];
            const vf z = from + kBase;
            w[half] = weight(z, from - (z - kBase));
        }
        store_as(p + block * kTileSize + i * 64, pair_weights(w[0], w[1]));
    }

    // Sums of values in N tiles from `tile` on: loaded, added to block by block, and stored. Together with `tile` 0 the
    // weights' sums. Uses tiles 0 to 5 and 7.
    template <int N>
    ALWAYS_INLINE void load_sums(const float* sums, const float* weights) const {
        const int64_t stride = static_cast<int64_t>(tiles) * 64;
        Tile<0>::load(sums, stride);
        if constexpr (N > 1) Tile<1>::load(sums + 16, stride);
        if constexpr (N > 2) Tile<2>::load(sums + 32, stride);
        if constexpr (N > 3) Tile<3>::load(sums + 48, stride);
        Tile<7>::load(weights, 4);
    }
    template <int N>
    ALWAYS_INLINE void multiply_values(int tile, int block) const {
        const char* b = value_tiles + (static_cast<int64_t>(block) * tiles + tile) * kTileSize;
        Tile<4>::load(p + block * kTileSize, 64);
        Tile<5>::load(b, 64);
        tile_product<0, 4, 5>();
        if constexpr (N > 1) {
            Tile<5>::load(b + kTileSize, 64);
            tile_product<1, 4, 5>();
        }
        if constexpr (N > 2) {
            Tile<5>::load(b + 2 * kTileSize, 64);
            tile_product<2, 4, 5>();
        }
        if constexpr (N > 3) {
            Tile<5>::load(b + 3 * kTileSize, 64);
            tile_product<3, 4, 5>();
        }
        if (tile == 0) tile_product<7, 4, 6>();
    }
    template <int N>
    ALWAYS_INLINE void store_sums(float* sums, float* weights) const {
        const int64_t stride = static_cast<int64_t>(tiles) * 64;
        Tile<0>::store(sums, stride);
        if constexpr (N > 1) Tile<1>::store(sums + 16, stride);
        if constexpr (N > 2) Tile<2>::store(sums + 32, stride);
        if constexpr (N > 3) Tile<3>::store(sums + 48, stride);
        Tile<7>::store(weights, 4);
    }

    // A tile with fewer than 16 queries is summed in `tail`, because the memory behind its sums belongs to others.
    ALWAYS_INLINE float* sums_of(const Queries& x) const {
        return x.rows == 16 ? acc + static_cast<int64_t>(x.first) * tiles * 16 : tail;
    }
    ALWAYS_INLINE float* weight_sums_of(const Queries& x) const {
        return x.rows == 16 ? l + x.first : tail + tiles * 256;
    }
    template <int N>
    ALWAYS_INLINE void open_sums(const Queries& x) const {
        if (x.rows < 16) {
            const int dims = tiles * 16;
            __builtin_memcpy(tail, acc + static_cast<int64_t>(x.first) * dims, static_cast<size_t>(x.rows) * dims * 4);
            __builtin_memcpy(tail + 16 * dims, l + x.first, x.rows * 4);
        }
        load_sums<N>(sums_of(x), weight_sums_of(x));
    }
    template <int N>
    __attribute__((noinline)) void sum_rest(const Queries& x, int tile) const {
        load_sums<N>(sums_of(x) + tile * 16, weight_sums_of(x));
        for (int block = x.begin; block < x.end; ++block) multiply_values<N>(tile, block);
        store_sums<N>(sums_of(x) + tile * 16, weight_sums_of(x));
    }
    template <int N>
    ALWAYS_INLINE void close_sums(const Queries& x) const {
        store_sums<N>(sums_of(x), weight_sums_of(x));
        int tile = N;
        for (; tile + 4 <= tiles; tile += 4) sum_rest<4>(x, tile);
        if (tile + 2 <= tiles) sum_rest<2>(x, tile), tile += 2;
        if (tile < tiles) sum_rest<1>(x, tile);
        if (x.rows < 16) {
            const int dims = tiles * 16;
            __builtin_memcpy(acc + static_cast<int64_t>(x.first) * dims, tail, static_cast<size_t>(x.rows) * dims * 4);
            __builtin_memcpy(l + x.first, tail + 16 * dims, x.rows * 4);
        }
    }

    // All queries [from, to). While a tile's scores become weights, the tile unit multiplies the weights of the tile
    // before with the values, and computes the scores of the tile after. Both share the buffers. The products read old
    // weights before new ones overwrite them; new scores overwrite only scores that have been read.
    template <int N>
    void run(int from, int to) const {
        const float c = (g.softcap > 0 ? g.softcap : g.scale) * 1.4426950408889634f;
        const vf factor = splat(c);
        Queries queries[3];
        Queries *before = queries, *x = queries + 1, *after = queries + 2;
        before->begin = before->end = 0;
        place(*x, from, to - from < 16 ? to - from : 16);
        for (int block = x->begin; block < x->end; ++block) multiply_keys(query_tiles(x->first), block);
        while (x->rows > 0) {
            const int next = x->first + x->rows;
            after->begin = after->end = after->rows = 0;
            if (next < to) place(*after, next, to - next < 16 ? to - next : 16);
            if (x->any()) shift(*x, c);
            int value = before->begin, key = after->begin;
            if (before->any()) open_sums<N>(*before);
            bool open = before->any();
            const bool beside = tiles <= N;  // otherwise the weights are read more than once
            for (int block = x->begin; block < x->end; ++block) {
                if (open) {
                    for (int n = 0; value < before->end && (n < 2 || value <= block || !beside); ++n, ++value)
                        multiply_values<N>(0, value);
                    if (value == before->end) {
                        close_sums<N>(*before);
                        open = false;
                    }
                }
                weigh(*x, block, factor);
                for (uint32_t rows = x->large; rows; rows &= rows - 1) weigh_large(*x, block, __builtin_ctz(rows), c);
                if (!open)
                    for (int n = 0; n < 2 && key <= block && key < after->end; ++n, ++key)
                        multiply_keys(query_tiles(after->first), key);
            }
            if (open) {
                for (; value < before->end; ++value) multiply_values<N>(0, value);
                close_sums<N>(*before);
            }
            for (; key < after->end; ++key) multiply_keys(query_tiles(after->first), key);
            Queries* done = before;
            before = x;
            x = after;
            after = done;
        }
        if (!before->any()) return;
        open_sums<N>(*before);
        for (int value = before->begin; value < before->end; ++value) multiply_values<N>(0, value);
        close_sums<N>(*before);
    }

    __attribute__((noinline)) void add_exact(const Queries& x, float c, const float* shrinks) const {
        for (int i = 0; i < x.rows; ++i) {
            vf sum = {};
            for (int t = x.begin * 2; t < x.end * 2; ++t) sum += exp2v<5>(load(s + t * 256 + i * 16) * c - x.shifts[i]);
            exact[x.first + i] = exact[x.first + i] * shrinks[i] + reduce_add(sum);
        }
    }
};

// Stores acc / l in bfloat16.
INLINE void store_half_row(const float* acc, float l, int n, uint16_t* out) {
    const float inverse = 1.0f / l;
    for (int i = 0; i < n; i += 16) {
        const __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)(load(acc + i) * inverse));
        _mm256_mask_storeu_epi16(out + i, static_cast<__mmask16>(n - i < 16 ? (1u << (n - i)) - 1 : 0xffff), half);
    }
}

void attention_on_tiles(const Attention& g, const AttentionTask& task) {
    const int dims = dims_of(g.head_dim), depth = (g.head_dim + 31) / 32, tiles = dims / 16;
    const int queries = (task.row_end - task.row_begin) * g.group, row_bytes = g.head_dim * 2;
    char* scratch = task.scratch;
    char* q = carve(scratch, static_cast<int64_t>(queries + 16) * depth * 64);
    char* key_tiles = carve(scratch, static_cast<int64_t>(kTileKeys) * depth * 64);
    char* value_tiles = carve(scratch, static_cast<int64_t>(kTileKeys) * dims * 2);
    char* stage = carve(scratch, static_cast<int64_t>(kTileKeys) * dims * 2);
    const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(carve(scratch, count * 4)); };
    float* acc = floats(static_cast<int64_t>(queries) * dims);
    float *m = floats(queries), *l = floats(queries), *exact = floats(queries);
    float *s = floats(kTileKeys * 16), *tail = floats(16 * dims + 16);
    char* p = carve(scratch, kTileKeys * 32);
    char* ones = carve(scratch, 64);

    const int first_head = task.kv_head * g.group;
    for (int i = 0; i < queries; ++i) {
        const int64_t row = task.row_begin + i / g.group, head = first_head + i % g.group;
        char* to = q + static_cast<int64_t>(i) * depth * 64;
        __builtin_memcpy(to, g.q + (row * g.q_row + head * g.q_head) * 2, row_bytes);
        __builtin_memset(to + row_bytes, 0, depth * 64 - row_bytes);
        m[i] = -__builtin_inff();
        l[i] = exact[i] = 0;
    }
    __builtin_memset(acc, 0, static_cast<size_t>(queries) * dims * 4);
    store_as(ones, vu{} + 0x3f803f80u);
    configure_tiles(kTileRows, 1 << 6 | 1 << 7);  // ones and sums of weights
    Tile<6>::load(ones, 4);

    for (int list = 0; list < 2; ++list) {
        const int32_t *lo = g.lo[list], *hi = g.hi[list];
        for (const KeyRun* run = task.runs[list]; run != task.runs_end[list] && run->row_begin < task.row_end; ++run) {
            const int row_begin = run->row_begin > task.row_begin ? run->row_begin : task.row_begin;
            const int row_end = run->row_end < task.row_end ? run->row_end : task.row_end;
            const bool joined = run->joined();
            const int last_key = joined ? hi[row_end - 1] - run->key_begin + run->prefix_keys : hi[row_end - 1];
            int key = joined ? 0 : run->key_begin + (lo[row_begin] - run->key_begin) / kTileKeys * kTileKeys;
            for (; key < last_key; key += kTileKeys) {
                const int keys = last_key - key < kTileKeys ? last_key - key : kTileKeys;
                const int keys_padded = (keys + 31) / 32 * 32;
                int64_t ldk = g.k_row * 2, ldv = g.v_row * 2;
                const char* k = g.k + task.kv_head * g.k_head * 2;
                k = joined ? gathered<BF16>(g, *run, k, key, keys, ldk, stage)
                           : staged<BF16>(g, k + key * ldk, keys, ldk, stage);
                pack_key_tiles(k, ldk, keys, keys_padded, dims, reinterpret_cast<int32_t*>(key_tiles));
                const char* v = g.v + task.kv_head * g.v_head * 2;
                v = joined ? gathered<BF16>(g, *run, v, key, keys, ldv, stage)
                           : staged<BF16>(g, v + key * ldv, keys, ldv, stage);
                pack_value_tiles(v, ldv, keys, keys_padded, dims, reinterpret_cast<uint32_t*>(value_tiles));
                const TileAttention tile{
                    g,           lo,  hi, *run, task.row_begin,          key, keys, depth, tiles, q, key_tiles,
                    value_tiles, acc, m,  l,    g.lse ? exact : nullptr, s,   p,    tail};
                const int from = (row_begin - task.row_begin) * g.group, to = (row_end - task.row_begin) * g.group;
                switch (tiles) {
                    case 1: tile.run<1>(from, to); break;
                    case 2: tile.run<2>(from, to); break;
                    case 3: tile.run<3>(from, to); break;
                    default: tile.run<4>(from, to);
                }
            }
        }
    }
    release_tiles();

    for (int i = 0; i < queries; ++i) {
        const int64_t row = task.row_begin + i / g.group, head = first_head + i % g.group;
        const bool empty = (!g.lo[0] || g.lo[0][row] >= g.hi[0][row]) && (!g.lo[1] || g.lo[1][row] >= g.hi[1][row]);
        store_half_row(acc + static_cast<int64_t>(i) * dims, empty ? 1.0f : l[i], g.head_dim,
                       reinterpret_cast<uint16_t*>(g.out) + row * g.out_row + head * g.out_head);
        if (g.lse)
            g.lse[row * g.heads + head] =
                empty ? -__builtin_inff() : m[i] * 0.6931471805599453f + __builtin_logf(exact[i]);
    }
}

size_t tile_attention_scratch(int head_dim, int queries) {
    const size_t dims = dims_of(head_dim), depth = (head_dim + 31) / 32;
    const size_t blocks = kTileKeys * (depth * 64 + dims * 4 + 64 + 32) + (16 * dims + 16) * 4;
    return blocks + (queries + 16) * (depth * 64 + dims * 4 + 12) + 13 * 64;
}
