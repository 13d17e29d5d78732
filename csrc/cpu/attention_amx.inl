// Self-attention of one document on AMX tiles, bfloat16. A tile of 16 queries goes through blocks of 32 keys: scores,
// weights and their product with the values are in flight for three neighbouring blocks at once, so that the tile unit
// and the vector units work side by side. Weights of a block are (16 queries, 32 keys) in bfloat16; key t + j and key
// t + 16 + j stand next to each other there, as two vectors of weights are put together most cheaply.
//
// What makes a row's bits its own: blocks are counted from the document's first key, a sum takes keys in their order,
// and keys that the row does not see add zeros.

#include "tiles.inl"

// Keys, 16 at a time: [key / 16][step of 32 dims][16 pairs of dims][16 keys]. Keys and dims beyond are zeros.
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

// Values, 32 at a time: [key / 32][16 dims][16 pairs of keys][16 dims], in the weights' order. Keys beyond are zeros.
INLINE void pack_value_tiles(const char* v, int64_t ldv, int keys, int keys_padded, int head_dim, uint32_t* out) {
    for (int t = 0; t < keys_padded; t += 32) {
        for (int d = 0; d < head_dim; d += 16) {
            const char* row = v + t * ldv + d * 2;
            for (int j = 0; j < 16; ++j, row += ldv, out += 16) {
                const vu low = t + j < keys ? widen(reinterpret_cast<const uint16_t*>(row)) : vu{};
                const vu high =
                    t + j + 16 < keys ? widen(reinterpret_cast<const uint16_t*>(row + 16 * ldv)) : vu{};
                store_as(out, low | high << 16);
            }
        }
    }
}

// Shapes the tiles; from here to tilerelease the thread has tile state. Sums of weights are one column wide, and so are
// the ones that they are multiplied with.
constexpr int kSumTile = 2, kOnesTile = 3;
INLINE void configure_attention_tiles() {
    struct alignas(64) {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
        config.bytes[i] = i == kSumTile || i == kOnesTile ? 4 : 64;
        config.rows[i] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
}

// Weights of a row of 32 scores that all are within kNoShift of 0 are 2^(c score + 1/2): the constant half makes the
// mantissa's factor 2^(f + 1/2) with |f| <= 1/2 one of [1, 2], whose rounding to bfloat16 is an addition of half a unit
// and a cut, and the addition is part of the polynomial's last constant. The power of two is added to the bits.
// x + kBase has in its low bits round(x) + 64: 7 bits, if the score is within the bound.
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

struct TileAttention {
    const Attention& g;
    const char* q;                // this head's queries
    char* out;                    // this head's outputs
    const char *keys, *values;
    char* weights;                // [key / 32] tiles
    float* scores;                // two blocks of two tiles
    float* sums;                  // [head_dim / 16] tiles of outputs and 16 sums of weights
    char* query_tiles;            // [head_dim / 32] tiles
    float c;                      // scale * log2(e)

    // The keys that the row at position `at` sees.
    int first_key(int at) const { return g.window < 0 || at < g.window ? 0 : at - g.window; }
    int last_key(int at) const { return g.window < 0 || at + g.window + 1 > g.keys ? g.keys : at + g.window + 1; }
    int steps() const { return (g.head_dim + 31) / 32; }

    ALWAYS_INLINE float* scores_of(int block) const { return scores + (block & 1) * 512; }
    ALWAYS_INLINE char* weights_of(int block) const { return weights + block * static_cast<int64_t>(kTileBytes16); }

    // Lanes of 16 keys from t on that the row at `at` sees.
    ALWAYS_INLINE __mmask16 seen(int t, int at) const {
        const int from = first_key(at) - t, to = last_key(at) - t;
        const uint32_t above = from <= 0 ? 0xffffu : from >= 16 ? 0u : 0xffffu << from;
        const uint32_t below = to >= 16 ? 0xffffu : to <= 0 ? 0u : 0xffffu >> (16 - to);
        return static_cast<__mmask16>(above & below);
    }

    // Tile 4 holds the queries where the head is one step deep.
    ALWAYS_INLINE void multiply_keys(int block, const char* a, int64_t lda) const {
        const int depth = steps();
        const char* b = keys + static_cast<int64_t>(block) * 2 * depth * kTileBytes16;
        for (int half = 0; half < 2; ++half) {
            Tile<6>::zero();
            for (int s = 0; s < depth; ++s, b += kTileBytes16) {
                if (depth > 1) Tile<4>::load(a + s * 64, lda);
                Tile<5>::load(b, 64);
                tile_product<6, 4, 5>();
            }
            Tile<6>::store(scores_of(block) + half * 256, 64);
        }
    }

    // Output tiles 0 and, with two of them, 1.
    template <int NT>
    ALWAYS_INLINE void multiply_values(int block, int tile) const {
        const char* b = values + (static_cast<int64_t>(block) * (g.head_dim / 16) + tile) * kTileBytes16;
        Tile<7>::load(weights_of(block), 64);
        Tile<5>::load(b, 64);
        tile_product<0, 7, 5>();
        if constexpr (NT > 1) {
            Tile<5>::load(b + kTileBytes16, 64);
            tile_product<1, 7, 5>();
        }
    }

    template <bool kAll>
    ALWAYS_INLINE void weigh(int block, int rows, int first, vu& wide) const {
        const float* s = scores_of(block);
        uint32_t* p = reinterpret_cast<uint32_t*>(weights_of(block));
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

    // Rows with a score outside of the bound get the weights 2^(c score - the largest). Returns whether there are any.
    __attribute__((noinline)) bool reweigh(int begin, int end, int rows, int first, const char* a, int64_t lda) const {
        float largest[16];
        uint32_t outside = 0;
        alignas(64) float most[16 * 16];
        alignas(64) uint32_t wide[16 * 16] = {};
        for (int i = 0; i < 256; ++i) most[i] = -1e30f;
        for (int block = begin; block < end; ++block) {
            multiply_keys(block, a, lda);
            for (int half = 0; half < 2; ++half)
                for (int i = 0; i < rows; ++i) {
                    const __mmask16 mask = seen(block * 32 + half * 16, first + i);
                    const vf s = load(scores_of(block) + half * 256 + i * 16);
                    const vu bits = (vu)(s * c + kBase) ^ kBaseBits;
                    store_as(wide + i * 16, (vu)_mm512_mask_or_epi32(load_as<__m512i>(wide + i * 16), mask,
                                                                     load_as<__m512i>(wide + i * 16), (__m512i)bits));
                    const vf m = load(most + i * 16);
                    store(most + i * 16, (vf)_mm512_mask_max_ps((__m512)m, mask, (__m512)s, (__m512)m));
                }
        }
        for (int i = 0; i < rows; ++i) {
            if (_mm512_reduce_or_epi32(load_as<__m512i>(wide + i * 16)) & ~127) outside |= 1u << i;
            largest[i] = reduce_max(load(most + i * 16)) * c;
        }
        if (!outside) return false;
        for (int block = begin; block < end; ++block) {
            multiply_keys(block, a, lda);
            for (int i = 0; i < rows; ++i) {
                if (!(outside >> i & 1)) continue;
                __m512i e[2];
                for (int half = 0; half < 2; ++half) {
                    const vf s = load(scores_of(block) + half * 256 + i * 16);
                    const __m256i h = (__m256i)_mm512_maskz_cvtneps_pbh(seen(block * 32 + half * 16, first + i),
                                                                        (__m512)exp2v<3>(s * c - largest[i]));
                    e[half] = _mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
                }
                store_as(weights_of(block) + i * 64, pair_weights((vu)e[0], (vu)e[1]));
            }
        }
        return true;
    }

    template <int NT>
    ALWAYS_INLINE void keep_sums(int tile) const {
        Tile<0>::store(sums + tile * 256, 64);
        if constexpr (NT > 1) Tile<1>::store(sums + tile * 256 + 256, 64);
    }

    // Output tiles from `tile` on from the weights of all blocks.
    template <int NT>
    ALWAYS_INLINE void sum_values(int tile, int begin, int end) const {
        Tile<0>::zero();
        if constexpr (NT > 1) Tile<1>::zero();
        for (int block = begin; block < end; ++block) multiply_values<NT>(block, tile);
        keep_sums<NT>(tile);
    }

    // NT: tiles of outputs that are summed beside the scores.
    template <int NT>
    void run(int row, int rows) const {
        const int first = g.query_start + row, last = first + rows - 1, tiles = g.head_dim / 16;
        const int begin = first_key(first) / 32, end = (last_key(last) + 31) / 32;
        const int all_from = first_key(last), all_to = last_key(first);  // keys that every row of the tile sees
        const char* a = q + row * g.ldq * 2;
        int64_t lda = g.ldq * 2;
        if (rows < 16 || g.head_dim % 32) {
            lda = steps() * 64;
            for (int i = 0; i < rows; ++i) __builtin_memcpy(query_tiles + i * lda, a + i * g.ldq * 2, g.head_dim * 2);
            a = query_tiles;
        }
        if (steps() == 1) Tile<4>::load(a, lda);
        Tile<0>::zero();
        if constexpr (NT > 1) Tile<1>::zero();
        Tile<kSumTile>::zero();
        vu wide = {};
        multiply_keys(begin, a, lda);
        for (int block = begin; block < end; ++block) {
            if (block + 1 < end) multiply_keys(block + 1, a, lda);
            if (block > begin) {
                multiply_values<NT>(block - 1, 0);
                tile_product<kSumTile, 7, kOnesTile>();
            }
            if (block * 32 >= all_from && block * 32 + 32 <= all_to)
                weigh<true>(block, rows, first, wide);
            else
                weigh<false>(block, rows, first, wide);
        }
        multiply_values<NT>(end - 1, 0);
        tile_product<kSumTile, 7, kOnesTile>();
        keep_sums<NT>(0);
        if ((_mm512_reduce_or_epi32((__m512i)wide) & ~127) && reweigh(begin, end, rows, first, a, lda)) {
            sum_values<NT>(0, begin, end);
            Tile<kSumTile>::zero();
            for (int block = begin; block < end; ++block) {
                Tile<7>::load(weights_of(block), 64);
                tile_product<kSumTile, 7, kOnesTile>();
            }
        }
        float* denominators = sums + tiles * 256;
        Tile<kSumTile>::store(denominators, 4);
        int tile = NT;
        for (; tile + 2 <= tiles; tile += 2) sum_values<2>(tile, begin, end);
        if (tile < tiles) sum_values<1>(tile, begin, end);
        store(denominators, 1.0f / load(denominators));
        finish(row, rows, denominators);
    }

    ALWAYS_INLINE void finish(int row, int rows, const float* inverse) const {
        const int tiles = g.head_dim / 16;
        for (int i = 0; i < rows; ++i) {
            char* y = out + (row + i) * g.ldo * static_cast<int64_t>(bytes_of(g.out_format));
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

void attention_on_tiles(const Attention& g) {
    const int keys_padded = (g.keys + 31) / 32 * 32, depth = (g.head_dim + 31) / 32, tiles = g.head_dim / 16;
    char* scratch = g.scratch;
    const auto take = [&](int64_t bytes) {
        char* p = scratch;
        scratch += bytes;
        return p;
    };
    char* ones = take(64);
    char* query_tiles = take(depth * kTileBytes16);
    float* scores = reinterpret_cast<float*>(take(4 * kTileBytes16));
    float* sums = reinterpret_cast<float*>(take(tiles * kTileBytes16 + 64));
    char* weights = take(keys_padded / 32 * static_cast<int64_t>(kTileBytes16));
    char* keys = take(keys_padded / 16 * static_cast<int64_t>(depth) * kTileBytes16);
    char* values = take(keys_padded / 32 * static_cast<int64_t>(tiles) * kTileBytes16);
    store_as(ones, vu{} + 0x3f803f80u);
    __builtin_memset(query_tiles, 0, depth * kTileBytes16);
    configure_attention_tiles();
    Tile<kOnesTile>::load(ones, 4);
    for (int h = 0; h < g.heads; ++h) {
        const int64_t column = static_cast<int64_t>(h) * g.head_dim;
        pack_key_tiles(static_cast<const char*>(g.k) + column * 2, g.ldk * 2, g.keys, keys_padded, g.head_dim,
                       reinterpret_cast<int32_t*>(keys));
        pack_value_tiles(static_cast<const char*>(g.v) + column * 2, g.ldk * 2, g.keys, keys_padded, g.head_dim,
                         reinterpret_cast<uint32_t*>(values));
        const TileAttention head{g,       static_cast<const char*>(g.q) + column * 2,
                                 static_cast<char*>(g.out) + column * static_cast<int64_t>(bytes_of(g.out_format)),
                                 keys,    values,
                                 weights, scores,
                                 sums,    query_tiles,
                                 g.scale * 1.4426950408889634f};
        for (int row = 0; row < g.queries; row += 16) {
            const int rows = g.queries - row < 16 ? g.queries - row : 16;
            if (tiles > 1)
                head.run<2>(row, rows);
            else
                head.run<1>(row, rows);
        }
    }
    asm volatile("tilerelease");
}

size_t tile_attention_scratch(int keys, int head_dim) {
    const size_t blocks = (keys + 31) / 32, depth = (head_dim + 31) / 32, tiles = head_dim / 16;
    return (blocks * (1 + 2 * depth + tiles) + depth + tiles + 4) * kTileBytes16 + 2 * 64;
}
