// ops.peak: the operations that a level's multiply-add units sustain.
#pragma once
#include "isa/types.h"

namespace fastrerank::cpu {

// Operations per second of `threads` threads, a multiply-add counted as two: the best of 25 rounds.
double run_peak(const Kernels& k, Precision precision, int threads);

}  // namespace fastrerank::cpu
