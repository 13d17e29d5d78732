// The end of every level's file: the ops on the level's vector words and policies, and their table.
//
// All code of a level stays in its anonymous namespace and uses no standard templates: the linker keeps one copy of a
// template for all files, and could hand AVX-512 code to a CPU without it.
#include "isa/ops.inl"

constexpr Format kReducedAttention = BF16::kElement == 2 ? Format::kBF16 : Format::kF32;
constexpr Kernels kTable = {
    .isa = kIsa,
    .name = kName,
    .u8_max = kU8Max,
    .tiles = kTiles,
    .attention_format = {Format::kF32, kReducedAttention, kReducedAttention},
#define KERNEL(function, result, arguments) .function = function,
#include "isa/ops.inl"
#undef KERNEL
};
