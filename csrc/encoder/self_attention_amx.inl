// Self-attention of one document on AMX tiles, bfloat16. A tile of 16 queries goes through blocks of 32 keys. Scores,
// weights and the product with the values are computed for three neighbouring blocks at once, so that the tile unit and
// the vector units work side by side. The weights of a block are (16 queries, 32 keys) in bfloat16; keys t + j and t +
// 16 + j are neighbours there, because two vectors of weights are interleaved most cheaply in that order.
//
// A row's bits depend on that row alone: blocks are counted from the document's first key, sums take keys in their
// order, and keys that the row does not see add zeros.

// Keys, 16 at a time: [key / 16][step of 32 dims][16 pairs of dims][16 keys]. Padding is zeros.
INLINE void pack_key_tiles(const char* k, int64_t ldk, int keys, int keys_padded, int head_dim, int32_t* out) {
    const int units = head_dim / 2;
    for (int t = 0; t < keys_padded; t += 16) {
        for (int u = 0; u < units; u += 16, out += 256) {
            const int columns = units - u < 16 ? units - u : 16;
            if (columns < 16) __builtin_memset(out + columns * 16, 0, (16 - columns) * 64);
            transpose_block(k + t * ldk + u * 4, ldk, keys - t, columns, out, 16);
        }
    }
}

// Values, 32 at a time: [key / 32][16 dims][16 pairs of keys][16 dims], with the keys in the weights' order. Padding is
// zeros.
INLINE void pack_value_tiles(const char* v, int64_t ldv, int keys, int keys_padded, int head_dim, uint32_t* out) {
    for (int t = 0; t < keys_padded; t += 32) {
        for (int d = 0; d < head_dim; d += 16) {
            const char* row = v + t * ldv + d * 2;
            for (int j = 0; j < 16; ++j, row += ldv, out += 16) {
                const vu low = t + j < keys ? widen(reinterpret_cast<const uint16_t*>(row)) : vu{};
                const vu high = t + j + 16 < keys ? widen(reinterpret_cast<const uint16_t*>(row + 16 * ldv)) : vu{};
                store_as(out, low | high << 16);
            }
        }
    }
}

// The tiles of the weights' sums, and of the ones that the weights are multiplied with, are one column wide.
constexpr int kSumTile = 2, kOnesTile = 3;

// A row of 32 scores within kNoShift of 0 gets the weights 2^(c score + 1/2). The constant half moves the mantissa's
// factor 2^(f + 1/2), |f| <= 1/2, into [1, 2]. It is rounded to bfloat16 by adding half a unit and truncating; the half
// unit is part of the polynomial's last constant. The power of two is added to the bits. The low bits of x + kBase are
// round(x) + 64, which takes 7 bits if the score is within the bound.
constexpr float kBase = 12582912.0f + 64.0f;
constexpr int32_t kBaseBits = 0x4b400000;
INLINE vu tile_weight(vf s, vf c, vu& wide) {
    const vf y = s * c + kBase;
    wide |= (vu)y ^ kBaseBits;
    const vf f = s * c - (y - kBase);
    constexpr float k = 1.4142135623730951f * 0x1p-64f;
    vf p = f * (0.055171623826026917f * k) + 0.2426111251115799f * k;
    p = p * f + 0.6932609677314758f * k;
    p = p * f + (0.9999280571937561f * k + 0x1p-72f);
    return (vu)p + ((vu)y << 23);
}
INLINE vu pair_weights(vu low, vu high) {
    return (vu)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)(low >> 16), (__m512i)high);
}

struct TileSelfAttention {
    const SelfAttention& g;
    const char* q;  // this head's queries
    char* out;  // this head's outputs
    const char *keys, *values;
    char* weights;  // two buffers of [key / 32] tiles, for neighbouring tiles of queries
    int blocks;  // key / 32
    float* scores;  // three blocks of two tiles, the third for reweigh
    float* sums;  // [head_dim / 16] tiles of outputs and 16 sums of weights
    char* query_tiles;  // two buffers of [head_dim / 32] tiles
    float c;  // scale * log2(e)

    // The keys that the row at position `at` sees.
    int first_key(int at) const { return g.window < 0 || at < g.window ? 0 : at - g.window; }
    int last_key(int at) const { return g.window < 0 || at + g.window + 1 > g.keys ? g.keys : at + g.window + 1; }
    int steps() const { return (g.head_dim + 31) / 32; }

    // Lanes of 16 keys from t on that the row at `at` sees.
    ALWAYS_INLINE __mmask16 seen(int t, int at) const {
        const int from = first_key(at) - t, to = last_key(at) - t;
        const uint32_t above = from <= 0 ? 0xffffu : from >= 16 ? 0u : 0xffffu << from;
        const uint32_t below = to >= 16 ? 0xffffu : to <= 0 ? 0u : 0xffffu >> (16 - to);
        return static_cast<__mmask16>(above & below);
    }

    // Rows [row, row + rows), which see keys of the blocks [begin, end). Their tiles are loaded from `a`.
    struct Queries {
        int row, rows, begin, end;
        const char* a;
        int64_t lda;
        char* weights;
        char* weights_of(int block) const { return weights + block * static_cast<int64_t>(kTileSize); }
    };
    ALWAYS_INLINE Queries place(int row) const {
        Queries x;
        x.row = row;
        x.weights = weights + (row >> 4 & 1) * blocks * static_cast<int64_t>(kTileSize);
        x.rows = g.queries - row < 16 ? g.queries - row : 16;
        x.begin = first_key(g.query_start + row) / 32;
        x.end = (last_key(g.query_start + row + x.rows - 1) + 31) / 32;
        x.a = q + row * g.ldq * 2;
        x.lda = g.ldq * 2;
        if (x.rows < 16 || g.head_dim % 32) {
            char* copy = query_tiles + (row >> 4 & 1) * steps() * kTileSize;
            x.lda = steps() * 64;
            for (int i = 0; i < x.rows; ++i) __builtin_memcpy(copy + i * x.lda, x.a + i * g.ldq * 2, g.head_dim * 2);
            x.a = copy;
        }
        return x;
    }

    // Scores of a block of 32 keys. Where the head is one step deep, tile 4 already holds the queries.
    ALWAYS_INLINE void multiply_keys(int block, const char* a, int64_t lda, float* to) const {
        const int depth = steps();
        const char* b = keys + static_cast<int64_t>(block) * 2 * depth * kTileSize;
        for (int half = 0; half < 2; ++half) {
            Tile<6>::zero();
            for (int s = 0; s < depth; ++s, b += kTileSize) {
                if (depth > 1) Tile<4>::load(a + s * 64, lda);
                Tile<5>::load(b, 64);
                tile_product<6, 4, 5>();
            }
            Tile<6>::store(to + half * 256, 64);
        }
    }

    // Output tiles 0 and, with two of them, 1.
    template <int NT>
    ALWAYS_INLINE void multiply_values(const Queries& x, int block, int tile) const {
        const char* b = values + (static_cast<int64_t>(block) * (g.head_dim / 16) + tile) * kTileSize;
        Tile<7>::load(x.weights_of(block), 64);
        Tile<5>::load(b, 64);
        tile_product<0, 7, 5>();
        if constexpr (NT > 1) {
            Tile<5>::load(b + kTileSize, 64);
            tile_product<1, 7, 5>();
        }
    }

    template <bool kAll>
    ALWAYS_INLINE void weigh(const Queries& x, const float* s, int block, vu& wide) const {
        uint32_t* p = reinterpret_cast<uint32_t*>(x.weights_of(block));
        const int rows = x.rows, first = g.query_start + x.row;
        const vf factor = splat(c);
        vu outside = wide;
        for (int i = 0; i < rows; ++i) {
            vu low = tile_weight(load(s + i * 16), factor, outside);
            vu high = tile_weight(load(s + 256 + i * 16), factor, outside);
            if constexpr (!kAll) {
                low = (vu)_mm512_maskz_mov_epi32(seen(block * 32, first + i), (__m512i)low);
                high = (vu)_mm512_maskz_mov_epi32(seen(block * 32 + 16, first + i), (__m512i)high);
            }
            store_as(p + i * 16, pair_weights(low, high));
        }
        wide = outside;
    }

    // Gives queries with a score outside the bound the weights 2^(c score - the largest). Returns whether there are
    // any.
    __attribute__((noinline)) bool reweigh(const Queries& x) const {
        const int first = g.query_start + x.row;
        float* s = scores + 1024;
        alignas(64) float most[256], largest[16];
        alignas(64) uint32_t wide[256] = {};
        for (float& m : most) m = -1e30f;
        if (steps() == 1) Tile<4>::load(x.a, x.lda);
        for (int block = x.begin; block < x.end; ++block) {
            multiply_keys(block, x.a, x.lda, s);
            for (int half = 0; half < 2; ++half)
                for (int i = 0; i < x.rows; ++i) {
                    const __mmask16 mask = seen(block * 32 + half * 16, first + i);
                    const vf score = load(s + half * 256 + i * 16), m = load(most + i * 16);
                    const __m512i bits = (__m512i)((vu)(score * c + kBase) ^ kBaseBits),
                                  w = load_as<__m512i>(wide + i * 16);
                    store_as(wide + i * 16, _mm512_mask_or_epi32(w, mask, w, bits));
                    store(most + i * 16, (vf)_mm512_mask_max_ps((__m512)m, mask, (__m512)score, (__m512)m));
                }
        }
        uint32_t outside = 0;
        for (int i = 0; i < x.rows; ++i) {
            if (_mm512_reduce_or_epi32(load_as<__m512i>(wide + i * 16)) & ~127) outside |= 1u << i;
            largest[i] = reduce_max(load(most + i * 16)) * c;
        }
        if (!outside) return false;
        for (int block = x.begin; block < x.end; ++block) {
            multiply_keys(block, x.a, x.lda, s);
            for (uint32_t rows = outside; rows; rows &= rows - 1) {
                const int i = __builtin_ctz(rows);
                vu e[2];
                for (int half = 0; half < 2; ++half) {
                    const vf score = load(s + half * 256 + i * 16);
                    const __m256i h = (__m256i)_mm512_maskz_cvtneps_pbh(seen(block * 32 + half * 16, first + i),
                                                                        (__m512)exp2v<3>(score * c - largest[i]));
                    e[half] = (vu)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
                }
                store_as(x.weights_of(block) + i * 64, pair_weights(e[0], e[1]));
            }
        }
        return true;
    }

    // Products of a block with the values, and the weights' sums.
    template <int NT>
    ALWAYS_INLINE void multiply_block(const Queries& x, int block) const {
        multiply_values<NT>(x, block, 0);
        tile_product<kSumTile, 7, kOnesTile>();
    }

    template <int NT>
    ALWAYS_INLINE void keep_sums(int tile) const {
        Tile<0>::store(sums + tile * 256, 64);
        if constexpr (NT > 1) Tile<1>::store(sums + tile * 256 + 256, 64);
    }

    // Output tiles from `tile` on from the weights of all blocks.
    template <int NT>
    ALWAYS_INLINE void sum_values(const Queries& x, int tile) const {
        Tile<0>::zero();
        if constexpr (NT > 1) Tile<1>::zero();
        for (int block = x.begin; block < x.end; ++block) multiply_values<NT>(x, block, tile);
        keep_sums<NT>(tile);
    }

    template <int NT>
    ALWAYS_INLINE void open_sums() const {
        Tile<0>::zero();
        if constexpr (NT > 1) Tile<1>::zero();
        Tile<kSumTile>::zero();
    }

    // Stores the sums of a tile of queries whose weights are complete. Returns whether tile 4 was overwritten.
    template <int NT>
    ALWAYS_INLINE bool close_sums(const Queries& x, vu wide) const {
        const int tiles = g.head_dim / 16;
        const bool outside = _mm512_reduce_or_epi32((__m512i)wide) & ~127;
        if (outside && reweigh(x)) {
            open_sums<NT>();
            for (int block = x.begin; block < x.end; ++block) multiply_block<NT>(x, block);
        }
        keep_sums<NT>(0);
        Tile<kSumTile>::store(sums + tiles * 256, 4);
        int tile = NT;
        for (; tile + 2 <= tiles; tile += 2) sum_values<2>(x, tile);
        if (tile < tiles) sum_values<1>(x, tile);
        return outside;
    }

    // NT: output tiles that are summed in the same pass as the scores. While a block of scores becomes weights, the
    // tile unit computes the next block's scores and the products of the block before, across tiles of queries too.
    // Weights are read one block after they were written, because a tile load waits for stores that have not reached
    // the cache.
    template <int NT>
    void run() const {
        Queries x = place(0), before = x;
        if (steps() == 1) Tile<4>::load(x.a, x.lda);
        float *now = scores, *then = scores + 512;
        multiply_keys(x.begin, x.a, x.lda, now);
        open_sums<NT>();
        vu wide_before = {};
        for (;;) {
            const int first = g.query_start + x.row, last = first + x.rows - 1;
            const int all_from = first_key(last), all_to = last_key(first);  // keys that every row of the tile sees
            const bool more = x.row + x.rows < g.queries;
            bool finished = x.row == 0;
            Queries after = x;
            vu wide = {};
            for (int block = x.begin; block < x.end; ++block) {
                if (block + 1 < x.end) {
                    multiply_keys(block + 1, x.a, x.lda, then);
                } else if (more) {
                    after = place(x.row + 16);
                    if (steps() == 1) Tile<4>::load(after.a, after.lda);
                    multiply_keys(after.begin, after.a, after.lda, then);
                }
                if (block * 32 >= all_from && block * 32 + 32 <= all_to)
                    weigh<true>(x, now, block, wide);
                else
                    weigh<false>(x, now, block, wide);
                if (block > x.begin) {
                    if (!finished) finish(before);
                    finished = true;
                    multiply_block<NT>(x, block - 1);
                } else if (x.row) {
                    multiply_block<NT>(before, before.end - 1);
                    const bool again = close_sums<NT>(before, wide_before);
                    const Queries& held = block + 1 < x.end ? x : after;
                    if (again && steps() == 1) Tile<4>::load(held.a, held.lda);
                    open_sums<NT>();
                }
                float* done = now;
                now = then;
                then = done;
            }
            if (!finished) finish(before);
            before = x;
            wide_before = wide;
            if (!more) break;
            x = after;
        }
        multiply_block<NT>(before, before.end - 1);
        close_sums<NT>(before, wide_before);
        finish(before);
    }

    ALWAYS_INLINE void finish(const Queries& x) const {
        const int tiles = g.head_dim / 16;
        float* inverse = sums + tiles * 256;
        store(inverse, 1.0f / load(inverse));
        for (int i = 0; i < x.rows; ++i) {
            char* y = out + (x.row + i) * g.ldo * static_cast<int64_t>(bytes_of(g.out_format));
            for (int tile = 0; tile < tiles; ++tile) {
                const vf v = load(sums + tile * 256 + i * 16) * inverse[i];
                if (g.out_format == Format::kBF16)
                    store_bf16(reinterpret_cast<uint16_t*>(y) + tile * 16, v);
                else
                    store(reinterpret_cast<float*>(y) + tile * 16, v);
            }
        }
    }
};

void self_attention_on_tiles(const SelfAttention& g) {
    const int keys_padded = (g.keys + 31) / 32 * 32, depth = (g.head_dim + 31) / 32, tiles = g.head_dim / 16;
    char* scratch = g.scratch;
    char* ones = carve(scratch, 64);
    char* query_tiles = carve(scratch, 2 * depth * kTileSize);
    float* scores = reinterpret_cast<float*>(carve(scratch, 6 * kTileSize));
    float* sums = reinterpret_cast<float*>(carve(scratch, tiles * kTileSize + 64));
    char* weights = carve(scratch, keys_padded / 32 * static_cast<int64_t>(2 * kTileSize));
    char* keys = carve(scratch, keys_padded / 16 * static_cast<int64_t>(depth) * kTileSize);
    char* values = carve(scratch, keys_padded / 32 * static_cast<int64_t>(tiles) * kTileSize);
    store_as(ones, vu{} + 0x3f803f80u);
    __builtin_memset(query_tiles, 0, 2 * depth * kTileSize);
    configure_tiles(kTileRows, 1 << kSumTile | 1 << kOnesTile);
    Tile<kOnesTile>::load(ones, 4);
    for (int h = 0; h < g.heads; ++h) {
        const int64_t column = static_cast<int64_t>(h) * g.head_dim;
        pack_key_tiles(static_cast<const char*>(g.k) + column * 2, g.ldk * 2, g.keys, keys_padded, g.head_dim,
                       reinterpret_cast<int32_t*>(keys));
        pack_value_tiles(static_cast<const char*>(g.v) + column * 2, g.ldk * 2, g.keys, keys_padded, g.head_dim,
                         reinterpret_cast<uint32_t*>(values));
        const TileSelfAttention head{g,
                                     static_cast<const char*>(g.q) + column * 2,
                                     static_cast<char*>(g.out) + column * static_cast<int64_t>(bytes_of(g.out_format)),
                                     keys,
                                     values,
                                     weights,
                                     keys_padded / 32,
                                     scores,
                                     sums,
                                     query_tiles,
                                     g.scale * 1.4426950408889634f};
        if (tiles > 1)
            head.run<2>();
        else
            head.run<1>();
    }
    release_tiles();
}

size_t tile_self_attention_scratch(int keys, int head_dim) {
    const size_t blocks = (keys + 31) / 32, depth = (head_dim + 31) / 32, tiles = head_dim / 16;
    return (blocks * (2 + 2 * depth + tiles) + 2 * depth + tiles + 6) * kTileSize + 2 * 64;
}
