// What weighted rows of attention weigh on each key, over all keys: cuts the keys into tasks and runs them.
#pragma once
#include "kernels.h"

namespace fastrerank::cpu {

// Throws std::invalid_argument where an interval leaves [0, keys). The result does not depend on `threads`.
void run_attention_mass(const Kernels& k, const AttentionMass& g, int threads);

}  // namespace fastrerank::cpu
