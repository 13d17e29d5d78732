// The readout of LLM reranking over all rows: logits of K label rows, and their order.
#pragma once
#include "kernels.h"

namespace fastrerank::cpu {

// order, where not null: (rows, labels) positions of labels by logit descending, ties by position, NaN as -infinity.
// A row's result does not depend on the other rows or on `threads`.
void run_label_logits(const Kernels& k, const LabelLogits& g, int32_t* order, int threads);

// y (rows, ldy) = the rows of g.x normed, float32 or bfloat16 as they come; see Kernels::norm_rows.
void run_norm_rows(const Kernels& k, const LabelLogits& g, void* y, int64_t ldy, int threads);

}  // namespace fastrerank::cpu
