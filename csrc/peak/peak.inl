// Loops that keep a level's multiply-add units busy.

// Vector units: the register tile of products, on operands that stay in the first-level cache.
template <class P>
INLINE double peak_with(int64_t iterations) {
    static const char zeros[P::kRows * 4 + P::kVectors * P::kBBytes] = {};
    const char* p = zeros;
    typename P::Acc c[P::kRows][P::kVectors] = {};
    for (int64_t it = 0; it < iterations; ++it) {
        asm volatile("" : "+r"(p));  // the compiler must assume that the operands change
        multiply<P, P::kRows, P::kVectors>(c, p, 4, p + P::kRows * 4, 1);
    }
    typename P::Acc sum = {};
    UNROLL for (int i = 0; i < P::kRows; ++i) UNROLL for (int j = 0; j < P::kVectors; ++j) sum += c[i][j];
    asm volatile("" ::"m"(sum));
    return 2.0 * iterations * P::kRows * P::kVectors * VL * P::kStep;
}

#ifdef FASTRERANK_TILES
// Tile unit: four independent sums, on operands that stay in their tiles.
template <class P>
INLINE double tile_peak(int64_t iterations) {
    static const char zeros[kTileRows * kTileBytes] = {};
    configure_tiles(kTileRows);
    Tile<0>::zero(), Tile<1>::zero(), Tile<2>::zero(), Tile<3>::zero();
    Tile<4>::load(zeros, kTileBytes), Tile<5>::load(zeros, kTileBytes);
    Tile<6>::load(zeros, kTileBytes), Tile<7>::load(zeros, kTileBytes);
    for (int64_t i = 0; i < iterations; ++i) {
        P::template multiply<0, 4, 6>();
        P::template multiply<1, 4, 7>();
        P::template multiply<2, 5, 6>();
        P::template multiply<3, 5, 7>();
    }
    release_tiles();
    return 2.0 * static_cast<double>(iterations) * 4 * kTileRows * VL * P::kInputs;
}
#endif

double peak(Precision precision, int64_t iterations) {
#ifdef FASTRERANK_TILES
    if (precision == Precision::kInt8) return tile_peak<TileS8>(iterations);
    if (precision == Precision::kBFloat16) return tile_peak<TileBF16>(iterations);
#endif
    switch (precision) {
        case Precision::kFloat32: return peak_with<F32>(iterations);
        case Precision::kBFloat16: return peak_with<BF16>(iterations);
        case Precision::kInt8: return peak_with<S8>(iterations);
    }
    return 0;
}
