// Products of 8-bit and bfloat16 matrices on AMX tiles. A tile holds 16 rows of inputs, 16 steps of 16 columns of
// weights, or 16 x 16 sums. Tiles 0 to 3 hold the sums of 32 rows x 32 columns, 4 and 5 inputs, 6 and 7 weights.
//
// The packed layout is that of linear.inl, with panels of two vectors and k padded to whole tiles: a tile of weights is
// every other cache line of a panel. Sums pass through a buffer in the first-level cache. While the tiles of one block
// are multiplied, the vector units run the epilogue on the sums of the block before.
#include "linear/terms.inl"

constexpr int kBlock = 2 * kTileRows;
// Rows of one pass: their scales are copied to the stack.
constexpr int kMostRows = 512;

struct TileS8 : S8 {
    static constexpr int kVectors = 2, kInputs = 64;
    template <int C, int A, int B>
    INLINE void multiply() {
        tile_product_u8s8<C, A, B>();
    }
};
struct TileBF16 : BF16 {
    static constexpr int kVectors = 2, kInputs = 32;
    template <int C, int A, int B>
    INLINE void multiply() {
        tile_product<C, A, B>();
    }
};

// Sums of a block, row-major.
struct alignas(64) BlockSums {
    char line[kBlock * 2 * kTileBytes];
    static constexpr int kStride = 2 * kTileBytes;
};
template <int T>
INLINE void store_sums(BlockSums& sums, int row, int column) {
    Tile<T>::store(sums.line + row * BlockSums::kStride + column * kTileBytes, BlockSums::kStride);
}

// Rows of inputs in one or two tiles; the second tile begins `second` rows below the first. Where the number of rows is
// not a multiple of 16, the last tile overlaps the one before. A row's sums are the same in both tiles, and its
// epilogue runs once.
struct RowBlock {
    int first, second, from, to;  // the epilogue runs on the rows [from, to)
};

// The last step's inputs, filled with zeros, where k is not a multiple of a step.
struct alignas(64) LastStep {
    char line[kBlock * kTileBytes];
};
INLINE void copy_last_step(LastStep& last, const char* a, int64_t lda, int rows, int bytes) {
    __builtin_memset(last.line, 0, sizeof last.line);
    for (int i = 0; i < rows; ++i) __builtin_memcpy(last.line + i * kTileBytes, a + i * lda, bytes);
}

// One step of a block. Calls beside() after every product.
template <class P, int MR, int NV, class Beside>
INLINE void tile_step(const char* a, int64_t lda, int64_t second, const char* b, const Beside& beside) {
    constexpr int64_t ldb = NV * kTileBytes;
    Tile<4>::load(a, lda);
    Tile<6>::load(b, ldb);
    P::template multiply<0, 4, 6>();
    beside();
    if constexpr (NV == 2) {
        Tile<7>::load(b + kTileBytes, ldb);
        P::template multiply<1, 4, 7>();
        beside();
    }
    if constexpr (MR == 2) {
        Tile<5>::load(a + second, lda);
        P::template multiply<2, 5, 6>();
        beside();
        if constexpr (NV == 2) {
            P::template multiply<3, 5, 7>();
            beside();
        }
    }
}

// Sums of one block of rows and a panel.
template <class P, int MR, int NV, class Beside>
INLINE void tile_block(BlockSums& sums, const Linear& g, const RowBlock& r, const char* b, const char* ahead, int lines,
                       const Beside& beside) {
    const int64_t lda = g.ldx * P::kElement;
    const char* a = static_cast<const char*>(g.x) + r.first * lda;
    const int bytes = g.w->k_padded * P::kElement, steps = bytes / kTileBytes, left = bytes % kTileBytes;
    Tile<0>::zero();
    if constexpr (NV == 2) Tile<1>::zero();
    if constexpr (MR == 2) {
        Tile<2>::zero();
        if constexpr (NV == 2) Tile<3>::zero();
    }
    for (int s = 0; s < steps; ++s) {
        for (int i = 0; i < lines; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        tile_step<P, MR, NV>(a + s * kTileBytes, lda, r.second * lda, b, beside);
        b += NV * kTileRows * kTileBytes;
    }
    if (left) {
        LastStep last;
        const int rows = r.second + (r.to - r.first < kTileRows ? r.to - r.first : kTileRows);
        copy_last_step(last, a + steps * kTileBytes, lda, rows, left);
        tile_step<P, MR, NV>(last.line, kTileBytes, r.second * kTileBytes, b, beside);
    }
    store_sums<0>(sums, 0, 0);
    if constexpr (NV == 2) store_sums<1>(sums, 0, 1);
    if constexpr (MR == 2) {
        store_sums<2>(sums, r.second, 0);
        if constexpr (NV == 2) store_sums<3>(sums, r.second, 1);
    }
}

// For 8-bit rows: the scale, and the scale times the zero point.
struct RowFactors {
    float scale[kMostRows], zero[kMostRows];
};

// Computes float32 sums again with fused multiply-adds. It is called where a tile's sums are not finite.
vf fused_sums(const Linear& g, int row, int n);

// Runs the epilogue on the sums of a block, row by row.
template <class P, int NV, class Put>
struct Finish {
    static constexpr bool kScaled = P::kElement == 1;
    const Put put;
    const Linear* const g;
    const int64_t ldy;
    const char *sums = nullptr, *end = nullptr;  // of the next row, and behind the block's last row
    const float *scale = nullptr, *zero = nullptr;
    int64_t at = 0;  // of the next row's outputs
    int next_row = 0, column = 0;
    Columns w[NV] = {};

    ALWAYS_INLINE Finish(const Put& p, const Linear& l) : put(p), g(&l), ldy(l.ldy) {}
    ALWAYS_INLINE void begin(const RowFactors* rows, const BlockSums& s, const RowBlock& r, int n) {
        sums = s.line + (r.from - r.first) * BlockSums::kStride;
        end = s.line + (r.to - r.first) * BlockSums::kStride;
        if constexpr (kScaled) scale = rows->scale + r.from, zero = rows->zero + r.from;
        at = r.from * ldy + n;
        next_row = r.from;
        column = n;
        UNROLL for (int j = 0; j < NV; ++j) w[j] = columns_at<P>(*g->w, n + j * VL);
    }
    ALWAYS_INLINE void row() {
        if (sums == end) return;
        vf v[NV];
        UNROLL for (int j = 0; j < NV; ++j) {
            typename P::Acc sum = load_as<typename P::Acc>(sums + j * kTileBytes);
            if constexpr (P::kElement == bytes_of(Format::kTerms)) {
                const __mmask16 odd = not_finite(sum);
                if (__builtin_expect(odd, 0))
                    sum = (vf)_mm512_mask_mov_ps((__m512)sum, odd, (__m512)fused_sums(*g, next_row, column + j * VL));
            }
            v[j] = finish(w[j], sum, kScaled ? *scale : 0, kScaled ? *zero : 0);
        }
        put(at, next_row, v);
        sums += BlockSums::kStride;
        at += ldy;
        ++next_row;
        if constexpr (kScaled) ++scale, ++zero;
    }
    ALWAYS_INLINE void rest() {
        while (sums != end) row();
    }
};

#include "linear/linear_terms.inl"

template <class P, int NV, class Put>
INLINE void tile_panels(const Linear& g, const RowFactors& rows, int begin, int end, const Put& put) {
    const int steps = (g.w->k_padded + P::kInputs - 1) / P::kInputs;
    BlockSums sums[2];
    int turn = 0;
    Finish<P, NV, Put> before(put, g);
    // A block has 32 rows for the epilogue, but with 6 steps only 24 products.
    const bool twice = steps * 4 < kBlock;
    // Each step prefetches this many cache lines of the next panel, so that the blocks share the panel out evenly.
    const int blocks = (g.rows + kBlock - 1) / kBlock, lines = (NV * kTileRows + blocks - 1) / blocks;
    const auto beside = [&]() __attribute__((always_inline)) {
        before.row();
        if (twice) before.row();
    };
    for (int n = begin; n < end; n += NV * VL) {
        const char* b = g.w->data + static_cast<int64_t>(n) * steps * kTileBytes;
        const char* ahead = b + static_cast<int64_t>(NV) * VL * steps * kTileBytes;
        for (int row = 0; row < g.rows; row += kBlock, ahead += static_cast<int64_t>(lines) * steps * 64) {
            const int left = g.rows - row;
            RowBlock r{row, 0, row, row + (left < kBlock ? left : kBlock)};
            if (left > kTileRows) {
                r.second = left < kBlock ? left - kTileRows : kTileRows;
                tile_block<P, 2, NV>(sums[turn], g, r, b, ahead, lines, beside);
            } else {
                if (g.rows > kTileRows) r.first = g.rows - kTileRows;
                tile_block<P, 1, NV>(sums[turn], g, r, b, ahead, lines, beside);
            }
            before.rest();
            before.begin(&rows, sums[turn], r, n);
            turn ^= 1;
        }
    }
    before.rest();
}

template <class P, class Put>
void tile_rows(const Linear& g, const Put& put) {
    RowFactors rows;
    if constexpr (P::kElement == 1)
        for (int i = 0; i < g.rows; ++i) {
            const RowScale x = g.x_scale[i];
            rows.scale[i] = x.scale;
            rows.zero[i] = x.scale * static_cast<float>(x.zero);
        }
    configure_tiles(g.rows < kTileRows ? g.rows : kTileRows);
    const int pairs = g.w->n_padded / (2 * VL) * (2 * VL);
    if constexpr (P::kElement == bytes_of(Format::kTerms)) {
        terms_panels<2>(g, 0, pairs, put);
        terms_panels<1>(g, pairs, g.w->n_padded, put);
    } else {
        tile_panels<P, 2>(g, rows, 0, pairs, put);
        if (pairs < g.w->n_padded) tile_panels<P, 1>(g, rows, pairs, g.w->n_padded, put);
    }
    release_tiles();
}

template <class P>
void tile_linear_some(const Linear& g) {
    const bool fast_gelu = g.act == Activation::kGelu && g.fast_act;
    float* const y = static_cast<float*>(g.y);
    uint16_t* const half = static_cast<uint16_t*>(g.y);
    const float* const add = g.add;
    // put(at, row, v): v is one or two vectors of a row's outputs, before the activation. The common cases have
    // functions without branches.
#define EACH UNROLL for (int j = 0; j < static_cast<int>(sizeof v / sizeof v[0]); ++j)
    if (!g.mul && !(fast_gelu && add) && (fast_gelu || g.act == Activation::kIdentity)) {
        if (g.y_format == Format::kBF16 && !add) {
            if (fast_gelu)
                return tile_rows<P>(g, [=](int64_t at, int, const auto& v) __attribute__((always_inline)) {
                    EACH store_bf16(half + at + j * VL, gelu_fast(v[j]));
                });
            return tile_rows<P>(g, [=](int64_t at, int, const auto& v) __attribute__((always_inline)) {
                EACH store_bf16(half + at + j * VL, v[j]);
            });
        }
        if (g.y_format == Format::kF32) {
            if (fast_gelu)
                return tile_rows<P>(g, [=](int64_t at, int, const auto& v) __attribute__((always_inline)) {
                    EACH store(y + at + j * VL, gelu_fast(v[j]));
                });
            if (add)
                return tile_rows<P>(g, [=](int64_t at, int, const auto& v) __attribute__((always_inline)) {
                    EACH store(y + at + j * VL, v[j] + load(add + at + j * VL));
                });
            return tile_rows<P>(g, [=](int64_t at, int, const auto& v) __attribute__((always_inline)) {
                EACH store(y + at + j * VL, v[j]);
            });
        }
    }
    if (g.act == Activation::kGelu && !g.fast_act && !g.mul && !add && g.y_format == Format::kTerms) {
        const int64_t ldy = g.ldy;
        return tile_rows<P>(g, [=](int64_t at, int row, const auto& v) __attribute__((always_inline)) {
            uint16_t* const to = half + at + 2 * ldy * row;
            if constexpr (sizeof v == 2 * sizeof v[0])
                store_terms(to, ldy, gelu(v[0]), gelu(v[1]));
            else
                store_terms(to, ldy, gelu(v[0]));
        });
    }
    tile_rows<P>(g, [&](int64_t at, int row, const auto& v) {
        float t[2 * VL];
        EACH store(t + j * VL, v[j]);
        activate(t, static_cast<int>(sizeof v / sizeof v[0]), g.act, g.fast_act);
        if (g.y_format == Format::kTerms) {
            EACH {
                vf x = load(t + j * VL);
                if (g.mul) x *= load(g.mul + at + j * VL);
                if (g.add) x += load(g.add + at + j * VL);
                store_terms(half + at + 2 * g.ldy * row + j * VL, g.ldy, x);
            }
            return;
        }
        EACH store_output(g, at + j * VL, load(t + j * VL));
    });
#undef EACH
}

template <class P>
void tile_linear(const Linear& g) {
    Linear some = g;
    for (int row = 0; row < g.rows; row += kMostRows) {
        const int64_t y = row * g.ldy;
        some.rows = g.rows - row < kMostRows ? g.rows - row : kMostRows;
        some.x = static_cast<const char*>(g.x) + row * g.ldx * P::kElement;
        some.x_scale = g.x_scale ? g.x_scale + row : nullptr;
        some.mul = g.mul ? g.mul + y : nullptr;
        some.add = g.add ? g.add + y : nullptr;
        some.y = static_cast<char*>(g.y) + y * static_cast<int64_t>(bytes_of(g.y_format));
        tile_linear_some<P>(some);
    }
}
