// ops.label_logits: logits of K label rows of an LM head for normed hidden states, and the labels' order.
#pragma once
#include "norm_rows/norm_rows.h"

namespace fastrerank::cpu {

// logits[r][j] = softcap(normed(x[r]) . w[j] * scale + bias[j]), float32 from the load on; NaN and infinities pass.
struct LabelLogits : NormRows {
    const void* w;  // (labels, ldw)
    Source w_source;
    int64_t ldw;
    int labels;
    const float* bias;     // (labels,) or null
    float scale, softcap;  // softcap * tanh(logit / softcap); 0: no cap
    float* out;            // (rows, labels)
};

constexpr int kLabelRows = 4;

// order, unless null: (rows, labels) positions of labels by logit descending, ties by position, NaN as -infinity.
// A row's result does not depend on the other rows or on `threads`.
void run_label_logits(const Kernels& k, const LabelLogits& g, int32_t* order, int threads);

}  // namespace fastrerank::cpu
