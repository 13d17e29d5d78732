// Attention by key intervals over all rows: cuts the work into tasks for the levels' kernels and runs them.
#pragma once
#include "kernels.h"

namespace fastrerank::cpu {

// Throws std::invalid_argument where an interval leaves [0, keys) or a row's two intervals overlap. The result does not
// depend on `threads`.
void run_interval_attention(const Kernels& k, const IntervalAttention& g, int rows, int keys, int threads);

}  // namespace fastrerank::cpu
