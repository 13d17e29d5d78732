// The end of every level's file: the kernels on the level's vector words and policies, and their table.
#include "gemm.inl"
#include "rows.inl"
#include "label_logits.inl"
#include "attention.inl"
#include "interval.inl"
#include "attention_mass.inl"
#include "cur.inl"

#ifdef FASTRERANK_TILES
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif

Format input_format(Precision p) {
    if (p == Precision::kInt8) return Format::kU8;
    if (p == Precision::kBFloat16 && BF16::kElement == 2) return Format::kBF16;
    return kTiles && p == Precision::kFloat32 ? Format::kTerms : Format::kF32;
}

double sustained(Precision p, int64_t iterations) {
#ifdef FASTRERANK_TILES
    if (p != Precision::kFloat32) return tile_peak_of(p, iterations);
#endif
    return peak(p, iterations);
}

constexpr Format kReducedAttention = BF16::kElement == 2 ? Format::kBF16 : Format::kF32;
constexpr Kernels kTable = {kIsa,
                            kName,
                            kU8Max,
                            kTiles,
                            input_format,
                            {Format::kF32, kReducedAttention, kReducedAttention},
                            packed_bytes,
                            pack,
                            linear,
                            attention,
                            attention_scratch,
                            interval_attention,
                            interval_scratch,
                            layer_norm,
                            label_logits,
                            norm_rows,
                            convert,
                            rope,
                            embed,
                            max_sim,
                            cur_scan,
                            cur_exact,
                            kth_largest,
                            sustained,
                            attention_mass,
                            mass_scratch};
