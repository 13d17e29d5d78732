// Words for AMX tiles. A tile is up to 16 rows of up to 64 bytes; `tile_product` adds to the 16 x 16 float32 sums of C
// the product of A, 16 rows of 32 bfloat16, and B, 16 rows of 16 pairs: B[k][n] holds what A's columns 2 k and 2 k + 1
// meet in column n. A sum takes its products in the order of k, and denormals count as zeros.
//
// Every word says that it touches memory: the compiler must not move the vectors' loads and stores across it.
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
INLINE void tile_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

constexpr int kTileSize = 1024;  // 16 rows of 64 bytes

// All tiles have 16 rows of 64 bytes but those of the bit set `narrow`, whose rows are one element of 4 bytes. From
// here to tilerelease the thread has tile state.
INLINE void shape_tiles(uint32_t narrow) {
    struct alignas(64) {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
        config.bytes[i] = narrow >> i & 1 ? 4 : 64;
        config.rows[i] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
}
