// The table of CPU kernels: one for each instruction-set level.
#pragma once
#include "isa/types.h"
#define FASTRERANK_INTERFACES
#include "isa/ops.inl"
#undef FASTRERANK_INTERFACES

namespace fastrerank::cpu {

struct Kernels {
    Isa isa;
    const char* name;
    int u8_max;                  // largest stored activation: 255, or 127 where 8-bit products would saturate
    bool tiles;                  // 8-bit and bfloat16 products run on AMX tiles
    Format attention_format[3];  // how self_attention takes q, k and v, by Precision

#define KERNEL(name, result, arguments) result(*name) arguments;
#include "isa/ops.inl"
#undef KERNEL
};

const Kernels* kernels(Isa isa);  // null where this build or this CPU lacks the level
Isa best_isa();                   // the highest level that this CPU runs
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* amx_kernels();

}  // namespace fastrerank::cpu
