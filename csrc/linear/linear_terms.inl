// Products of float32 matrices on bfloat16 tiles. With x = x1 + x2 + x3 and w likewise (terms.inl), the products x1 w3,
// x1 w2, x2 w2, x2 w1, x3 w1 and x1 w1 are summed, for each 32 inputs the small ones first. The three that are left out
// are below 2^-24 of |x w|, like the rounding to float32. A tile product sums its 32 inputs before it adds them, so a
// sum is rounded 6 times in 32 inputs, where multiply-adds round it 32 times.
//
// Inputs arrive as terms. Weights are packed as for float32 products; a block of a panel's inputs at a time is split
// into terms, in a buffer that all rows reuse from the cache. The next block is split while the products of this one
// run. Where a panel is deeper than a block, the rows' sums are kept in a buffer in between.

// float32 weights in panels of two vectors, as many as a tile product takes; a panel is read from end to end.
struct TileF32 : F32 {
    static constexpr int kVectors = 2;
};
struct TileTerms : F32 {
    static constexpr int kElement = bytes_of(Format::kTerms);
};
constexpr int kTermsInputs = 384, kTermsSteps = kTermsInputs / 32;
constexpr int kTermsTile = kTileRows * kTileBytes;
constexpr int kWaitingSums = 64;  // 256 KiB
static_assert(kWaitingSums >= kMostRows / kBlock);

struct alignas(64) SplitWeights {
    char line[kTermsSteps * 3 * 2 * kTermsTile];  // [step][term][vector][pair of inputs][column][2]
};

// Splits the weights of a panel of NV vectors of columns, pair by pair of inputs.
template <int NV>
struct WeightSplitter {
    static constexpr int kStride = NV * VL;  // from one input to the next
    static constexpr int kAhead = 48;  // inputs
    const float* from = nullptr;
    int inputs = 0;  // stored inputs that are left; a multiple of 4
    int pairs = 0;  // pairs of inputs that the buffer still takes, zeros included
    char* to = nullptr;

    ALWAYS_INLINE void open(const Linear& g, int n, int input, SplitWeights& s) {
        const int k = g.w->k_padded, left = (k - input + 31) / 32 * 32;
        from = reinterpret_cast<const float*>(g.w->data) + static_cast<int64_t>(n) * k + input * kStride;
        inputs = k - input;
        pairs = (left < kTermsInputs ? left : kTermsInputs) / 2;
        to = s.line;
    }
    ALWAYS_INLINE void pair() {
        if (!pairs) return;
        UNROLL for (int j = 0; j < NV; ++j) {
            Terms even{}, odd{};
            if (inputs > 0) {
                const float* w = from + j * VL;
                // Prefetched while the rows of a block are multiplied.
                __builtin_prefetch(w + kAhead * kStride);
                __builtin_prefetch(w + (kAhead + 1) * kStride);
                // If a weight's first term is infinite, its sums are not finite. `fused_sums` computes them again.
                even = split_finite(load(w));
                odd = split_finite(load(w + kStride));
            }
            UNROLL for (int t = 0; t < 3; ++t)
                store_as(to + (t * NV + j) * kTermsTile, upper_halves(kHalves.in_turn, even.t[t], odd.t[t]));
        }
        from += 2 * kStride;
        inputs -= 2;
        to += --pairs % 16 ? kTileBytes : kTileBytes + (3 * NV - 1) * kTermsTile;
    }
    ALWAYS_INLINE void rest() {
        while (pairs) pair();
    }
};

// Multiplies tiles 4 and 5 by tiles 6 and 7.
template <int MR, int NV>
INLINE void multiply_terms() {
    TileBF16::multiply<0, 4, 6>();
    if constexpr (NV == 2) TileBF16::multiply<1, 4, 7>();
    if constexpr (MR == 2) TileBF16::multiply<2, 5, 6>();
    if constexpr (MR == 2 && NV == 2) TileBF16::multiply<3, 5, 7>();
}

// One step. Calls beside(i) after each of its six products. `a` points to the rows' first terms, `plane` bytes before
// the second.
template <int MR, int NV, class Beside>
INLINE void terms_step(const char* a, int64_t lda, int64_t second, int64_t plane, const char* b, const Beside& beside) {
    const auto inputs = [&](int t) __attribute__((always_inline)) {
        Tile<4>::load(a + t * plane, lda);
        if constexpr (MR == 2) Tile<5>::load(a + t * plane + second, lda);
    };
    const auto weights = [&](int t) __attribute__((always_inline)) {
        Tile<6>::load(b + t * NV * kTermsTile, kTileBytes);
        if constexpr (NV == 2) Tile<7>::load(b + (t * NV + 1) * kTermsTile, kTileBytes);
    };
    inputs(0), weights(2), multiply_terms<MR, NV>(), beside(0);
    weights(1), multiply_terms<MR, NV>(), beside(1);
    inputs(1), multiply_terms<MR, NV>(), beside(2);
    weights(0), multiply_terms<MR, NV>(), beside(3);
    inputs(2), multiply_terms<MR, NV>(), beside(4);
    inputs(0), multiply_terms<MR, NV>(), beside(5);
}

// Adds the inputs from `input` on to the sums of one block of rows and a panel. `before` holds the sums so far, or is
// null.
template <int MR, int NV, class Beside>
INLINE void terms_block(const BlockSums* before, BlockSums& sums, const Linear& g, const RowBlock& r, int input,
                        const SplitWeights& weights, const Beside& beside) {
    const int64_t lda = g.ldx * TileTerms::kElement, plane = g.ldx * 2;
    const char *a = static_cast<const char*>(g.x) + r.first * lda + input * 2, *b = weights.line;
    const int inputs = g.w->k_padded - input < kTermsInputs ? g.w->k_padded - input : kTermsInputs;
    if (before) {
        const char* s = before->line;
        Tile<0>::load(s, BlockSums::kStride);
        if constexpr (NV == 2) Tile<1>::load(s + kTileBytes, BlockSums::kStride);
        if constexpr (MR == 2) {
            s += r.second * BlockSums::kStride;
            Tile<2>::load(s, BlockSums::kStride);
            if constexpr (NV == 2) Tile<3>::load(s + kTileBytes, BlockSums::kStride);
        }
    } else {
        Tile<0>::zero(), Tile<1>::zero(), Tile<2>::zero(), Tile<3>::zero();
    }
    for (int s = 0; s < inputs / 32; ++s, a += kTileBytes, b += 3 * NV * kTermsTile)
        terms_step<MR, NV>(a, lda, r.second * lda, plane, b, beside);
    if (inputs % 32) {
        LastStep last[3];
        const int rows = r.second + (r.to - r.first < kTileRows ? r.to - r.first : kTileRows);
        for (int t = 0; t < 3; ++t) copy_last_step(last[t], a + t * plane, lda, rows, inputs % 32 * 2);
        terms_step<MR, NV>(last[0].line, kTileBytes, r.second * kTileBytes, sizeof last[0], b, beside);
    }
    store_sums<0>(sums, 0, 0);
    if constexpr (NV == 2) store_sums<1>(sums, 0, 1);
    if constexpr (MR == 2) {
        store_sums<2>(sums, r.second, 0);
        if constexpr (NV == 2) store_sums<3>(sums, r.second, 1);
    }
}

// The sums of a row and a vector of columns by fused multiply-adds. They are right for infinities and NaN, whose terms
// would be multiplied by zeros and by each other, and where a partial sum overflows.
__attribute__((noinline)) vf fused_sums(const Linear& g, int row, int n) {
    constexpr int kPanel = TileF32::kVectors * VL;
    const int panel = n / kPanel * kPanel;
    const int64_t stride = g.w->n_padded - panel < kPanel ? g.w->n_padded - panel : kPanel;
    const float* w = reinterpret_cast<const float*>(g.w->data) + static_cast<int64_t>(panel) * g.w->k_padded + n -
                     panel;
    const uint16_t* x = static_cast<const uint16_t*>(g.x) + row * g.ldx * 3;
    vf sum = {};
    for (int i = 0; i < g.w->k_padded; ++i, w += stride) F32::dot(sum, splat(join_terms(x + i, g.ldx)), load(w));
    return sum;
}

// Goes through the inputs block by block, with all rows and as many panels as `waiting` has room for their sums. So a
// block of a deep row is read from memory once for all these panels, not once for each.
template <int NV, class Put>
void terms_panels(const Linear& g, int begin, int end, const Put& put) {
    if (begin == end) return;
    constexpr int kPanel = NV * VL;
    SplitWeights weights[2];
    BlockSums waiting[kWaitingSums], sums[2];
    int turn = 0, half = 0;
    Finish<TileTerms, NV, Put> before(put, g);
    WeightSplitter<NV> next;
    next.open(g, begin, 0, weights[0]);
    next.rest();
    // Pairs of weights that each step of a block splits.
    const int blocks = (g.rows + kBlock - 1) / kBlock, pairs = (16 + blocks - 1) / blocks;
    const auto beside = [&](int i) __attribute__((noinline)) {
        // A row's epilogue takes the vector units about as long as a product takes the tile unit, so it runs beside
        // every other product.
        if (i & 1)
            for (int p = pairs * (i / 2) / 3; p < pairs * (i / 2 + 1) / 3; ++p) next.pair();
        else
            before.row();
    };
    for (int group = begin, group_end; group < end; group = group_end) {
        group_end = group + kWaitingSums / blocks * kPanel;
        if (group_end > end) group_end = end;
        for (int input = 0; input < g.w->k_padded; input += kTermsInputs) {
            const bool last = input + kTermsInputs >= g.w->k_padded;
            BlockSums* wait = waiting;
            for (int n = group; n < group_end; n += kPanel) {
                if (n + kPanel < group_end)
                    next.open(g, n + kPanel, input, weights[half ^ 1]);
                else if (!last)
                    next.open(g, group, input + kTermsInputs, weights[half ^ 1]);
                else if (group_end < end)
                    next.open(g, group_end, 0, weights[half ^ 1]);
                for (int row = 0; row < g.rows; row += kBlock, ++wait) {
                    const int left = g.rows - row;
                    RowBlock r{row, 0, row, row + (left < kBlock ? left : kBlock)};
                    const BlockSums* from = input ? wait : nullptr;
                    BlockSums& to = last ? sums[turn] : *wait;
                    if (left > kTileRows) {
                        r.second = left < kBlock ? left - kTileRows : kTileRows;
                        terms_block<2, NV>(from, to, g, r, input, weights[half], beside);
                    } else {
                        if (g.rows > kTileRows) r.first = g.rows - kTileRows;
                        terms_block<1, NV>(from, to, g, r, input, weights[half], beside);
                    }
                    if (!last) continue;
                    before.rest();
                    before.begin(nullptr, sums[turn], r, n);
                    turn ^= 1;
                }
                next.rest();
                half ^= 1;
            }
        }
    }
    before.rest();
}
