// AVX-512 with BF16 and AMX (tiles of 8-bit and bfloat16 products): Sapphire Rapids and later.
#include "isa/kernels.h"
#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#include <immintrin.h>

namespace fastrerank::cpu {
namespace {
constexpr Isa kIsa = Isa::kAmx;
constexpr const char* kName = "amx";
#define FASTRERANK_TILES
#include "isa/avx512.inl"
#include "isa/tiles.inl"
#include "isa/level.inl"
}  // namespace

const Kernels* amx_kernels() { return &kTable; }
}  // namespace fastrerank::cpu
#else
const fastrerank::cpu::Kernels* fastrerank::cpu::amx_kernels() { return nullptr; }
#endif
