// dst[u * width + t] = src[t][u] for VL rows of `columns` <= VL 32-bit units; rows at or beyond `rows` read as zero.
INLINE void transpose_block(const char* src, int64_t ld, int rows, int columns, int32_t* dst, int width) {
    for (int t = 0; t < VL; ++t) {
        const int32_t* s = reinterpret_cast<const int32_t*>(src + t * ld);
        for (int u = 0; u < columns; ++u) dst[u * width + t] = t < rows ? s[u] : 0;
    }
}

// The low byte of every lane of four vectors, in order.
INLINE void store_low_bytes(uint8_t* q, vu a, vu b, vu c, vu d) {
    store_as(q, __builtin_convertvector(a, vb));
    store_as(q + VL, __builtin_convertvector(b, vb));
    store_as(q + 2 * VL, __builtin_convertvector(c, vb));
    store_as(q + 3 * VL, __builtin_convertvector(d, vb));
}
