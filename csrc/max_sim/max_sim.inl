template <int NV>
struct MaxSimPanel {
    const float* tokens;
    int64_t ld;
    const char* b;
    int dim;
    float* best;
    template <int MR>
    void run(int row) const {
        vf c[MR][NV];
        UNROLL for (int i = 0; i < MR; ++i) UNROLL for (int j = 0; j < NV; ++j) c[i][j] = vf{};
        multiply<F32, MR, NV>(c, reinterpret_cast<const char*>(tokens + row * ld), ld * 4, b, dim);
        UNROLL for (int i = 0; i < MR; ++i) UNROLL for (int j = 0; j < NV; ++j)
            store(best + j * VL, vmax(load(best + j * VL), c[i][j]));
    }
};

void max_sim(const char* packed_query, int query_tokens, int dim, const float* tokens, int64_t ld,
             const int64_t* offsets, int documents, float* best, float* out) {
    const int n_padded = static_cast<int>(padded(query_tokens)), k_padded = (dim + 3) / 4 * 4;
    for (int d = 0; d < documents; ++d) {
        for (int i = 0; i < n_padded; ++i) best[i] = -__builtin_inff();
        const float* rows = tokens + offsets[d] * ld;
        const int count = static_cast<int>(offsets[d + 1] - offsets[d]);
        for (int n = 0; n < n_padded; n += StoredF32::kVectors * VL) {
            const char* b = packed_query + static_cast<int64_t>(n) * k_padded * 4;
            const int left = (n_padded - n) / VL;
            if (left >= StoredF32::kVectors)
                for_row_tiles<F32::kRows>(count, MaxSimPanel<StoredF32::kVectors>{rows, ld, b, dim, best + n});
            else if (left == 2)
                for_row_tiles<F32::kRows>(count, MaxSimPanel<2>{rows, ld, b, dim, best + n});
            else
                for_row_tiles<F32::kRows>(count, MaxSimPanel<1>{rows, ld, b, dim, best + n});
        }
        double sum = 0;
        for (int i = 0; i < query_tokens; ++i) sum += best[i];
        out[d] = static_cast<float>(sum / query_tokens);
    }
}
