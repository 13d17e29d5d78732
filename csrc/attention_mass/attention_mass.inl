// The attention that rows give to keys. Products of a tile of queries with a panel of keys become softmax weights while
// they are in the first-level cache; these are summed over the rows, then over the heads, with one key in each lane.
//
// A key's bits depend on that key alone: its products are sums of pieces of the head of fixed length, its weights are
// added in the order of rows and heads, and a row that does not see it adds nothing, not even a zero.

constexpr int kMassQueries = 384;  // queries of a chunk: a multiple of every level's tile

// A row of one head.
struct MassQuery {
    float lse, weight;
    int32_t lo, hi;  // equal where the row adds nothing
    int32_t ends;  // the head if this is its last row, else -1
};

template <int N>
struct Vectors {
    static constexpr int value = N;
};

// n elements as float32.
template <Source S>
INLINE void widen_row(const void* from, int64_t at, int n, float* to) {
    const int full = n / VL * VL;
    for (int i = 0; i < full; i += VL) store(to + i, widen<S>(from, at + i));
    for (int i = full; i < n; ++i) to[i] = to_float(from, at + i, S);
}

// A panel of NV vectors of keys. The first `width` keys are real, the rest is padding.
template <int NV>
struct MassTile {
    const AttentionMass& g;
    const float* q;  // (queries, head_dim)
    const MassQuery* queries;
    const char* panel;
    int key, width;
    float *mass, *total;  // (NV VL,) sums of this head so far, and of the heads before it

    ALWAYS_INLINE vf share(vf score, float lse) const {
        vf x;
        if (g.softcap > 0)
            x = tanhv(score * (g.scale / g.softcap)) * g.softcap - lse;
        else
            x = score * g.scale - lse;
        x *= 1.4426950408889634f;
#ifndef FASTRERANK_SCALEF
        x = vmin(splat(128.0f), x);  // 2^128 is infinity; this order keeps NaN
#endif
        return exp2v<5>(x);
    }

    // Adds up sums of pieces of the head: one chain of 256 products would have twice torch's rounding error. It is not
    // inlined because GCC 12 keeps the accumulators in memory where it is compiled into `run`.
    template <int MR>
    __attribute__((noinline)) void scores(int at, float* s) const {
        constexpr int kPiece = 64;
        const int64_t lda = static_cast<int64_t>(g.head_dim) * 4;
        const char *a = reinterpret_cast<const char*>(q) + at * lda, *b = panel;
        for (int d = 0; d < g.head_dim; d += kPiece, a += kPiece * 4, b += kPiece * 4 * NV * VL) {
            vf c[MR][NV];
        UNROLL for (int i = 0; i < MR; ++i) UNROLL for (int j = 0; j < NV; ++j) c[i][j] = vf{};
            multiply<F32, MR, NV>(c, a, lda, b, g.head_dim - d < kPiece ? g.head_dim - d : kPiece);
            UNROLL for (int i = 0; i < MR; ++i) UNROLL for (int j = 0; j < NV; ++j) {
                float* to = s + (i * NV + j) * VL;
                store(to, d ? load(to) + c[i][j] : c[i][j]);
            }
        }
    }

    ALWAYS_INLINE void add_row(const MassQuery& row, const float* s) const {
        for (int j = 0; j < NV; ++j)
            store(mass + j * VL, load(mass + j * VL) + share(load(s + j * VL), row.lse) * row.weight);
    }
    ALWAYS_INLINE void add_part_of_row(const MassQuery& row, const float* s) const {
        for (int j = 0; j < NV; ++j) {
            vi at;
            for (int i = 0; i < VL; ++i) at[i] = key + j * VL + i;
            const vf before = load(mass + j * VL);
            const vf sum = before + share(load(s + j * VL), row.lse) * row.weight;
            const vi seen = (at >= splat_int(row.lo)) & (at < splat_int(row.hi));
            store(mass + j * VL, seen ? sum : before);
        }
    }

    void end_head(int head) const {
        if (g.per_head) {
            float* out = g.out + head * g.out_head + key;
            for (int t = 0; t < width; ++t) out[t] += mass[t];
        } else {
            const float weight = g.head_weight ? g.head_weight[head] : 1.0f;
            for (int j = 0; j < NV; ++j)
                store(total + j * VL, load(total + j * VL) + load(mass + j * VL) * weight);
        }
        for (int j = 0; j < NV; ++j) store(mass + j * VL, vf{});
    }

    template <int MR>
    void run(int at) const {
        const MassQuery* row = queries + at;
        const auto sees = [&](int i) { return row[i].lo < key + width && row[i].hi > key; };
        bool some = false;
        for (int i = 0; i < MR; ++i) some |= sees(i);
        alignas(64) float s[MR * NV * VL];
        if (some) scores<MR>(at, s);
        for (int i = 0; i < MR; ++i) {
            if (row[i].lo <= key && row[i].hi >= key + width)
                add_row(row[i], s + i * NV * VL);
            else if (sees(i))
                add_part_of_row(row[i], s + i * NV * VL);
            if (row[i].ends >= 0) end_head(row[i].ends);
        }
    }
};

template <Source S>
void attention_mass_with(const AttentionMass& g, int key_begin, int key_end, char* scratch) {
    constexpr int W = F32::kVectors * VL;
    constexpr int64_t kElement = S == Source::kF32 ? 4 : 2;
    const int keys = key_end - key_begin, keys_padded = static_cast<int>(padded(keys)), dims = g.head_dim;
    const int64_t stage_row = padded(dims);
    float* q = reinterpret_cast<float*>(carve(scratch, int64_t{kMassQueries} * dims * 4));
    MassQuery* queries = reinterpret_cast<MassQuery*>(carve(scratch, kMassQueries * sizeof(MassQuery)));
    char* panels = carve(scratch, int64_t{keys_padded} * dims * 4);
    float* stage = reinterpret_cast<float*>(carve(scratch, W * stage_row * 4));
    float* mass = reinterpret_cast<float*>(carve(scratch, keys_padded * 4));
    float* total = reinterpret_cast<float*>(carve(scratch, keys_padded * 4));
    __builtin_memset(mass, 0, keys_padded * 4);
    __builtin_memset(total, 0, keys_padded * 4);
    const auto read = [&](int head) { return !g.head_weight || g.head_weight[head] != 0; };

    for (int kv_head = 0; kv_head < g.heads / g.group; ++kv_head) {
        const int first = kv_head * g.group, end = first + g.group;
        int head = first;
        while (head < end && !read(head)) ++head;
        if (head == end) continue;
        for (int t = 0; t < keys; t += W) {
            const int width = keys_padded - t < W ? keys_padded - t : W, real = keys - t < W ? keys - t : W;
            const int64_t at = (key_begin + t) * g.k_row + kv_head * g.k_head;
            const char* rows = static_cast<const char*>(g.k) + at * kElement;
            int64_t ld = g.k_row * 4;
            if constexpr (S != Source::kF32) {
                for (int i = 0; i < real; ++i) widen_row<S>(g.k, at + i * g.k_row, dims, stage + i * stage_row);
                rows = reinterpret_cast<const char*>(stage);
                ld = stage_row * 4;
            }
            pack_keys(rows, ld, real, width, dims, W, reinterpret_cast<int32_t*>(panels + int64_t{t} * dims * 4));
        }
        // Goes through the rows of all heads in chunks, head by head.
        for (int row = 0; head < end;) {
            int count = 0;
            while (head < end && count < kMassQueries) {
                const float lse = g.lse[static_cast<int64_t>(row) * g.heads + head];
                const bool none = lse == -__builtin_inff();
                queries[count] = {lse, g.row_weight[row], none ? 0 : g.lo[row], none ? 0 : g.hi[row],
                                  row + 1 == g.rows ? head : -1};
                widen_row<S>(g.q, row * g.q_row + head * g.q_head, dims, q + int64_t{count} * dims);
                ++count;
                if (++row < g.rows) continue;
                row = 0;
                do ++head;
                while (head < end && !read(head));
            }
            for (int t = 0; t < keys; t += W) {
                const int width = keys - t < W ? keys - t : W;
                const auto tile = [&](auto nv) __attribute__((always_inline)) {
                    const MassTile<decltype(nv)::value> tile{g, q, queries, panels + int64_t{t} * dims * 4,
                                                             key_begin + t, width, mass + t, total + t};
                    for_row_tiles<F32::kRows>(count, tile);
                };
                const int vectors = (keys_padded - t) / VL;
                if (vectors >= F32::kVectors)
                    tile(Vectors<F32::kVectors>{});
                else if (vectors == 2)
                    tile(Vectors<2>{});
                else
                    tile(Vectors<1>{});
            }
        }
    }
    if (g.per_head) return;
    for (int t = 0; t < keys; ++t) g.out[key_begin + t] += total[t];
}

void attention_mass(const AttentionMass& g, int key_begin, int key_end, char* scratch) {
    if (g.rows == 0) return;
    switch (g.source) {
        case Source::kF32: return attention_mass_with<Source::kF32>(g, key_begin, key_end, scratch);
        case Source::kF16: return attention_mass_with<Source::kF16>(g, key_begin, key_end, scratch);
        case Source::kBF16: return attention_mass_with<Source::kBF16>(g, key_begin, key_end, scratch);
    }
}

size_t attention_mass_scratch(int head_dim, int keys) {
    const size_t dims = padded(head_dim), keys_padded = padded(keys);
    return (kMassQueries + keys_padded + F32::kVectors * VL) * dims * 4 + kMassQueries * sizeof(MassQuery) +
           2 * keys_padded * 4 + 6 * 64;
}
