// Words for AMX tiles: eight registers of up to 16 rows of up to 64 bytes. A product adds to the 16 x 16 sums of C the
// products of A, 16 rows of 64 bytes, and B, 16 rows of 16 groups of 4 bytes: B[k][n] holds the values that A's k-th
// group meets in column n. A sum takes its products in the order of k, and bfloat16 products take denormals for zeros.
//
// Loads and stores tell the compiler that they touch memory, so it moves no vector load or store across them.
template <int T>
struct Tile {
    static ALWAYS_INLINE void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
    static ALWAYS_INLINE void load(const void* p, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
    }
    static ALWAYS_INLINE void store(void* p, int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
    }
};
template <int C, int A, int B>
INLINE void tile_product() {  // bfloat16
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
INLINE void tile_product_u8s8() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
INLINE void tile_product_s8u8() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

constexpr int kTileRows = 16, kTileBytes = 64;  // bytes of a row
constexpr int kTileSize = kTileRows * kTileBytes;

// Shapes the tiles: 16 rows of 64 bytes. Tiles 0 to 5, inputs and sums of a product, may have fewer `rows`, and a row
// of the tiles of the bit set `narrow` is one element of 4 bytes. The thread then has tile state until release_tiles.
INLINE void configure_tiles(int rows = kTileRows, uint32_t narrow = 0) {
    struct alignas(64) {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
        config.bytes[i] = narrow >> i & 1 ? 4 : kTileBytes;
        config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : kTileRows);
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
}
INLINE void release_tiles() { asm volatile("tilerelease"); }
