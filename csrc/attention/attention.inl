// Attention by key intervals. A block of keys and values at a time is packed into panels. Tiles of queries then compute
// scores, an online softmax and the product with the values while the block stays in L2, so memory does not grow with
// the intervals.
//
// A row's bits depend on that row alone: blocks and panels are counted from the first key of the row's run, or of its
// prefix where the two are joined; scores and products with the values are sums in key order; and keys that the row
// does not see add only zeros.

// A multiple of every level's panel width (48, 24, 16, 8).
constexpr int kKeyBlock = 480;

// Copies n elements of a row in the format of the policy's inputs.
template <class P>
INLINE void copy_row(const char* from, Format format, int n, char* to) {
    if (P::kStep == 1 && format == Format::kBF16) {
        const uint16_t* h = reinterpret_cast<const uint16_t*>(from);
        uint32_t* w = reinterpret_cast<uint32_t*>(to);
        for (int i = 0; i < n; ++i) w[i] = static_cast<uint32_t>(h[i]) << 16;
    } else {
        __builtin_memcpy(to, from, n * P::kElement);
    }
}

// Returns rows of a key or value head from which whole vectors of the policy's inputs can be read: the rows themselves
// where that is possible, else copies in `stage`, with zeros up to a whole vector. `ld` becomes their stride in bytes.
template <class P>
INLINE const char* staged(const Attention& g, const char* rows, int count, int64_t& ld, char* stage) {
    const int dims = dims_of(g.head_dim);
    const bool same = P::kElement == static_cast<int>(bytes_of(g.format));
    if (same && dims == g.head_dim) return rows;
    const int64_t to = dims * P::kElement;
    for (int t = 0; t < count; ++t) {
        copy_row<P>(rows + t * ld, g.format, g.head_dim, stage + t * to);
        __builtin_memset(stage + t * to + g.head_dim * P::kElement, 0, (dims - g.head_dim) * P::kElement);
    }
    ld = to;
    return stage;
}

// The same for a joined run's keys at the positions [begin, begin + count); they are always copied.
template <class P>
INLINE const char* gathered(const Attention& g, const KeyRun& run, const char* rows, int begin, int count, int64_t& ld,
                            char* stage) {
    const int dims = dims_of(g.head_dim);
    const int64_t to = dims * P::kElement;
    for (int t = 0; t < count; ++t) {
        copy_row<P>(rows + run.key(begin + t) * ld, g.format, g.head_dim, stage + t * to);
        __builtin_memset(stage + t * to + g.head_dim * P::kElement, 0, (dims - g.head_dim) * P::kElement);
    }
    ld = to;
    return stage;
}

// The dimensions of a value panel: as wide as a tile where that divides the head, else two vectors (64 = 2 x 32 rather
// than 48 + 16).
template <class P>
INLINE int value_panel(int head_dim) {
    return head_dim % (P::kVectors * VL) == 0 ? P::kVectors * VL : 2 * VL;
}

// Queries are numbered row by row and, within a row, head by head of the key head's group.
template <class P>
struct AttentionTile {
    const Attention& g;
    const int32_t *lo, *hi;  // of the list, by row
    const KeyRun& run_of_keys;
    int row_begin;  // row of query 0
    int query_begin;  // query that run(0) begins with
    int key_begin, keys;  // the block
    int keys_padded, panel, dims;  // panel: dims per value panel
    const char *q, *key_panels, *value_panels;
    float *acc, *m, *l;  // by query: product with the values, largest score (base 2), denominator
    float* s;  // (kRows, kKeyBlock)
    char* p;  // (kRows, kKeyBlock) in P's input format; s itself for float32

    // Where the row's keys begin and end. They are counted like key_begin: as keys, or as positions in a joined run.
    ALWAYS_INLINE int first_key(int row) const { return run_of_keys.joined() ? 0 : lo[row]; }
    ALWAYS_INLINE int end_key(int row) const {
        return run_of_keys.joined() ? hi[row] - run_of_keys.key_begin + run_of_keys.prefix_keys : hi[row];
    }

    // Adds up sums of pieces of the head: one chain of 256 products would have twice torch's rounding error.
    template <int MR, int NV>
    ALWAYS_INLINE void scores(int query, int t0) const {
        constexpr int kPiece = 64;
        const int64_t lda = static_cast<int64_t>(g.head_dim) * P::kElement;
        const char *a = q + query * lda, *b = key_panels + t0 * lda;
        for (int d = 0; d < g.head_dim; d += kPiece, a += kPiece * P::kElement, b += kPiece * P::kElement * NV * VL) {
            vf c[MR][NV];
        UNROLL for (int i = 0; i < MR; ++i) UNROLL for (int j = 0; j < NV; ++j) c[i][j] = vf{};
            const int left = g.head_dim - d < kPiece ? g.head_dim - d : kPiece;
            multiply<P, MR, NV>(c, a, lda, b, left / P::kStep);
            UNROLL for (int i = 0; i < MR; ++i) UNROLL for (int j = 0; j < NV; ++j) {
                float* to = s + i * kKeyBlock + t0 + j * VL;
                store(to, d ? load(to) + c[i][j] : c[i][j]);
            }
        }
    }

    // Turns the scores [begin, end) of tile row i into weights exp2(score - m), and those outside [a, b) into zeros.
    // Returns the factor by which the query's earlier sums must be multiplied.
    ALWAYS_INLINE float weights(int i, int query, int begin, int end, int a, int b) const {
        float* x = s + i * kKeyBlock;
        char* y = p + i * kKeyBlock * P::kElement;
        if (a >= b) {
            for (int j = begin; j < end; j += VL) P::store_input(y, j, vf{});
            return 1.0f;
        }
        float c = g.scale * 1.4426950408889634f;
        if (g.softcap > 0) {
            const float inner = g.scale / g.softcap;
            for (int j = begin; j < end; j += VL) store(x + j, tanhv(load(x + j) * inner));
            c = g.softcap * 1.4426950408889634f;
        }
        for (int j = begin; j < a; ++j) x[j] = -__builtin_inff();
        for (int j = b; j < end; ++j) x[j] = -__builtin_inff();
        vf largest = load(x + begin);
        for (int j = begin + VL; j < end; j += VL) largest = vmax(largest, load(x + j));
        const float block = reduce_max(largest) * c;
        const float now = block > m[query] ? block : m[query];
        const float shift = now == -__builtin_inff() ? 0.0f : now;  // all scores so far are -infinity: their weights are 0
        vf sum = {};
        for (int j = begin; j < end; j += VL) {
            const vf e = exp2v<5>(load(x + j) * c - shift);
            sum += e;
            P::store_input(y, j, e);
        }
        const float shrink = exp2v<5>(splat(m[query] - shift))[0];
        l[query] = l[query] * shrink + reduce_add(sum);
        m[query] = now;
        return shrink;
    }

    template <int MR, int NV>
    ALWAYS_INLINE void values_product(int query, int d0, int begin, int end, const float* shrink) const {
        vf c[MR][NV];
        UNROLL for (int i = 0; i < MR; ++i) UNROLL for (int j = 0; j < NV; ++j) c[i][j] = vf{};
        const char* b = value_panels + (static_cast<int64_t>(d0) * keys_padded + begin * NV * VL) * P::kElement;
        multiply<P, MR, NV>(c, p + begin * P::kElement, kKeyBlock * P::kElement, b, (end - begin) / P::kStep);
        UNROLL for (int i = 0; i < MR; ++i) UNROLL for (int j = 0; j < NV; ++j) {
            float* sum = acc + static_cast<int64_t>(query + i) * dims + d0 + j * VL;
            store(sum, load(sum) * shrink[i] + c[i][j]);
        }
    }

    template <int MR>
    void run(int at) const {
        constexpr int NV = P::kVectors, W = P::kVectors * VL;
        const int query = query_begin + at;
        const int first = row_begin + query / g.group, last = row_begin + (query + MR - 1) / g.group;
        // From row to row of a run, neither end moves back.
        const int lowest = first_key(first) - key_begin, highest = end_key(last) - key_begin;
        const int begin = lowest < 0 ? 0 : lowest / W * W;
        const int end = highest > keys ? keys_padded : static_cast<int>(padded(highest));
        if (begin >= end) return;
        for (int t = begin; t < end; t += W) {
            const int left = (keys_padded - t) / VL;
            if (left >= NV)
                scores<MR, NV>(query, t);
            else if (NV > 2 && left == 2)
                scores<MR, 2>(query, t);
            else
                scores<MR, 1>(query, t);
        }
        float shrink[MR];
        for (int i = 0; i < MR; ++i) {
            const int row = row_begin + (query + i) / g.group;
            const int a = first_key(row) - key_begin, b = end_key(row) - key_begin;
            shrink[i] = weights(i, query + i, begin, end, a < 0 ? 0 : a, b > keys ? keys : b);
        }
        for (int d = 0; d < dims; d += panel) {
            const int left = (dims - d) / VL;
            if (left >= NV && panel == W)
                values_product<MR, NV>(query, d, begin, end, shrink);
            else if (left >= 2)
                values_product<MR, 2>(query, d, begin, end, shrink);
            else
                values_product<MR, 1>(query, d, begin, end, shrink);
        }
    }
};

// Stores acc / l in the output's format. NaN stays NaN.
INLINE void store_row(const float* acc, float l, Format format, int n, char* out) {
    if (format == Format::kF32) {
        float* y = reinterpret_cast<float*>(out);
        for (int i = 0; i < n; ++i) y[i] = acc[i] / l;
        return;
    }
    uint16_t* y = reinterpret_cast<uint16_t*>(out);
    for (int i = 0; i < n; ++i) y[i] = round_bf16(acc[i] / l);
}

template <class P>
void attention_with(const Attention& g, const AttentionTask& task) {
    const int dims = dims_of(g.head_dim), queries = (task.row_end - task.row_begin) * g.group;
    const int64_t row_bytes = static_cast<int64_t>(g.head_dim) * P::kElement, element = bytes_of(g.format);
    const int64_t block_bytes = static_cast<int64_t>(kKeyBlock) * dims * P::kElement;
    char* scratch = task.scratch;
    char* q = carve(scratch, queries * row_bytes);
    char* key_panels = carve(scratch, block_bytes);
    char* value_panels = carve(scratch, block_bytes);
    char* stage = carve(scratch, block_bytes);
    float* acc = reinterpret_cast<float*>(carve(scratch, static_cast<int64_t>(queries) * dims * 4));
    float* m = reinterpret_cast<float*>(carve(scratch, queries * 4));
    float* l = reinterpret_cast<float*>(carve(scratch, queries * 4));
    float* s = reinterpret_cast<float*>(carve(scratch, P::kRows * kKeyBlock * 4));
    char* p = P::kStep == 1 ? reinterpret_cast<char*>(s) : carve(scratch, P::kRows * kKeyBlock * P::kElement);

    const int first_head = task.kv_head * g.group;
    for (int i = 0; i < queries; ++i) {
        const int64_t row = task.row_begin + i / g.group, head = first_head + i % g.group;
        copy_row<P>(g.q + (row * g.q_row + head * g.q_head) * element, g.format, g.head_dim, q + i * row_bytes);
        m[i] = -__builtin_inff();
        l[i] = 0;
    }
    __builtin_memset(acc, 0, static_cast<size_t>(queries) * dims * 4);

    for (int list = 0; list < 2; ++list) {
        const int32_t *lo = g.lo[list], *hi = g.hi[list];
        for (const KeyRun* run = task.runs[list]; run != task.runs_end[list] && run->row_begin < task.row_end; ++run) {
            const int row_begin = run->row_begin > task.row_begin ? run->row_begin : task.row_begin;
            const int row_end = run->row_end < task.row_end ? run->row_end : task.row_end;
            const bool joined = run->joined();
            const int last_key = joined ? hi[row_end - 1] - run->key_begin + run->prefix_keys : hi[row_end - 1];
            int key = joined ? 0 : run->key_begin + (lo[row_begin] - run->key_begin) / kKeyBlock * kKeyBlock;
            for (; key < last_key; key += kKeyBlock) {
                const int keys = last_key - key < kKeyBlock ? last_key - key : kKeyBlock;
                const int keys_padded = static_cast<int>(padded(keys));
                int64_t ldk = g.k_row * element, ldv = g.v_row * element;
                const char* k = g.k + task.kv_head * g.k_head * element;
                k = joined ? gathered<P>(g, *run, k, key, keys, ldk, stage)
                           : staged<P>(g, k + key * ldk, keys, ldk, stage);
                pack_keys(k, ldk, keys, keys_padded, g.head_dim / P::kStep, P::kVectors * VL,
                          reinterpret_cast<int32_t*>(key_panels));
                const char* v = g.v + task.kv_head * g.v_head * element;
                v = joined ? gathered<P>(g, *run, v, key, keys, ldv, stage)
                           : staged<P>(g, v + key * ldv, keys, ldv, stage);
                pack_values<P>(v, ldv, keys, keys_padded, dims, value_panel<P>(dims), value_panels);
                const AttentionTile<P> tile{g, lo, hi, *run, task.row_begin, (row_begin - task.row_begin) * g.group,
                                           key, keys, keys_padded, value_panel<P>(dims), dims,
                                           q, key_panels, value_panels, acc, m, l, s, p};
                for_row_tiles<P::kRows>((row_end - row_begin) * g.group, tile);
            }
        }
    }

    for (int i = 0; i < queries; ++i) {
        const int64_t row = task.row_begin + i / g.group, head = first_head + i % g.group;
        const bool empty = (!g.lo[0] || g.lo[0][row] >= g.hi[0][row]) && (!g.lo[1] || g.lo[1][row] >= g.hi[1][row]);
        store_row(acc + static_cast<int64_t>(i) * dims, empty ? 1.0f : l[i], g.format, g.head_dim,
                  g.out + (row * g.out_row + head * g.out_head) * element);
        if (g.lse)
            g.lse[row * g.heads + head] =
                empty ? -__builtin_inff() : m[i] * 0.6931471805599453f + __builtin_logf(l[i]);
    }
}

#ifdef FASTRERANK_TILES
#include "attention/attention_amx.inl"
#endif

void attention(const Attention& g, const AttentionTask& task) {
#ifdef FASTRERANK_TILES
    if (g.format == Format::kBF16) return attention_on_tiles(g, task);
#endif
#ifdef FASTRERANK_NATIVE_BF16
    if (g.format == Format::kBF16) return attention_with<BF16>(g, task);
#endif
    attention_with<F32>(g, task);
}

size_t attention_scratch(int head_dim, int queries) {
    const size_t dims = dims_of(head_dim);
    const size_t bytes = (dims * 8 + 8) * queries + 3 * kKeyBlock * dims * 4 + 2 * F32::kRows * kKeyBlock * 4 + 9 * 64;
#ifdef FASTRERANK_TILES
    const size_t on_tiles = tile_attention_scratch(head_dim, queries);
    return bytes > on_tiles ? bytes : on_tiles;
#endif
    return bytes;
}
