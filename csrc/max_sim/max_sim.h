// ops.max_sim: late interaction.
#pragma once
#include <cstdint>

#include "isa/types.h"

namespace fastrerank::cpu {

// out[d] = mean over the rows of query (query_tokens, dim) of the largest dot product with the rows
// [offsets[d], offsets[d + 1]) of tokens (.., dim). Throws std::invalid_argument where query is not finite. The result
// does not depend on `threads`.
void run_max_sim(const Kernels& k, const float* query, int query_tokens, int dim, const float* tokens,
                 const int64_t* offsets, int documents, int threads, float* out);

}  // namespace fastrerank::cpu
