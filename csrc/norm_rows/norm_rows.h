// Root-mean-square or layer norm of rows, float32 from the load on.
#pragma once
#include "isa/types.h"

namespace fastrerank::cpu {

enum class RowNorm : int { kNone = 0, kRms = 1, kLayer = 2 };

struct NormRows {
    const void* x;  // (rows, ldx)
    Source x_source;
    int64_t ldx, rows;
    int n;
    RowNorm norm;
    const float *gamma, *beta;  // (n,), either may be null
    float eps;
};

// y (rows, ldy) = the normed rows of x, in its format: float32 or bfloat16. The result does not depend on `threads`.
void run_norm_rows(const Kernels& k, const NormRows& g, void* y, int64_t ldy, int threads);

}  // namespace fastrerank::cpu
