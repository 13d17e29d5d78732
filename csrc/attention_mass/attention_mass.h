// ops.attention_mass: how much attention weighted rows give to each key.
#pragma once
#include "isa/types.h"

namespace fastrerank::cpu {

// out[t] += sum over heads h of head_weight[h] * sum over rows r with lo[r] <= t < hi[r] of
// row_weight[r] * exp(softcap(scale * q[r][h] . k[t][h / group]) - lse[r][h]), float32 from the load on. Heads of
// weight 0 and rows whose lse is -infinity are left out.
struct AttentionMass {
    const void *q, *k;
    Source source;                         // of q and k
    int64_t q_row, q_head, k_row, k_head;  // strides in elements
    int rows, keys, heads, group, head_dim;
    const float* lse;          // (rows, heads)
    const int32_t *lo, *hi;    // (rows,)
    const float* row_weight;   // (rows,)
    const float* head_weight;  // (heads,) or null
    float scale;
    float softcap;  // 0: no cap
    bool per_head;  // out is (heads, keys), of stride out_head; head_weight is null
    float* out;     // (keys,)
    int64_t out_head;
};

constexpr int kMassPanel = 48;  // a multiple of every level's panel of keys

// Cuts the keys into tasks and runs them. Throws std::invalid_argument where an interval leaves [0, keys). The result
// does not depend on `threads`.
void run_attention_mass(const Kernels& k, const AttentionMass& g, int threads);

}  // namespace fastrerank::cpu
