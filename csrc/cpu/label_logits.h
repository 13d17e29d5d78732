// The readout of LLM reranking over all rows: logits of K label rows, and their order.
#pragma once
#include "kernels.h"

namespace fastrerank::cpu {

// order, where not null: (rows, labels) positions of labels by logit descending, ties by position, NaN as -infinity.
// A row's result does not depend on the other rows or on `threads`.
void run_label_logits(const Kernels& k, const LabelLogits& g, int32_t* order, int threads);

}  // namespace fastrerank::cpu
