// Shared by the attention ops: parts of scratch memory, and panels of keys and values.

// The elements of a row of which whole vectors are read, for head_dim elements.
constexpr int dims_of(int head_dim) { return static_cast<int>(padded(head_dim)); }

INLINE char* carve(char*& scratch, int64_t bytes) {
    char* p = scratch;
    scratch += (bytes + 63) / 64 * 64;
    return p;
}

// Key panels of `panel_keys` keys, the last one narrower: [dim / kStep][key][kStep]. In 32-bit units this is a
// transpose for both formats.
INLINE void pack_keys(const char* k, int64_t ldk, int keys, int keys_padded, int units, int panel_keys, int32_t* out) {
    for (int t0 = 0; t0 < keys_padded; t0 += panel_keys) {
        const int width = keys_padded - t0 < panel_keys ? keys_padded - t0 : panel_keys;
        int32_t* panel = out + static_cast<int64_t>(t0) * units;
        for (int t = 0; t < width; t += VL) {
            for (int u = 0; u < units; u += VL) {
                const int columns = units - u < VL ? units - u : VL;
                transpose_block(k + (t0 + t) * ldk + u * 4, ldk, keys - t0 - t, columns,
                                panel + static_cast<int64_t>(u) * width + t, width);
            }
        }
    }
}

// Value panels of `dims` dimensions, the last one narrower: [key / kStep][dim][kStep].
template <class P>
INLINE void pack_values(const char* v, int64_t ldv, int keys, int keys_padded, int head_dim, int dims, char* out) {
    for (int d0 = 0; d0 < head_dim; d0 += dims) {
        const int width = head_dim - d0 < dims ? head_dim - d0 : dims;
        char* panel = out + static_cast<int64_t>(d0) * keys_padded * P::kElement;
        for (int t = 0; t < keys_padded; t += P::kStep, panel += width * P::kStep * P::kElement) {
            const char* row = v + t * ldv + d0 * P::kElement;
            for (int d = 0; d < width; d += VL) {
                if constexpr (P::kStep == 1) {
                    store(reinterpret_cast<float*>(panel) + d,
                          t < keys ? load(reinterpret_cast<const float*>(row) + d) : vf{});
                } else {
                    const uint16_t* pair = reinterpret_cast<const uint16_t*>(row);
                    const vu even = t < keys ? widen(pair + d) : vu{};
                    const vu odd = t + 1 < keys ? widen(pair + ldv / 2 + d) : vu{};
                    store_as(reinterpret_cast<uint32_t*>(panel) + d, even | odd << 16);
                }
            }
        }
    }
}
