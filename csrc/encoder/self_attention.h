// Self-attention of one document in the encoder, over all heads.
#pragma once
#include "isa/types.h"

namespace fastrerank::cpu {

// Query row i has position query_start + i and sees the keys whose position differs by at most `window` (negative:
// all keys).
struct SelfAttention {
    const void *q, *k, *v;  // (queries, ldq), (keys, ldk), (keys, ldk): head h in columns [h * head_dim, ...)
    Format format;          // of q, k, v: kF32 or kBF16
    int64_t ldq, ldk;
    int queries, keys, query_start;
    int heads, head_dim;    // head_dim is a multiple of 16
    float scale;
    int window;
    void* out;              // (queries, ldo)
    int64_t ldo;
    Format out_format;      // kF32, or kBF16 where the level has it
    char* scratch;          // self_attention_scratch(format, keys, head_dim) bytes, 64-aligned
};

}  // namespace fastrerank::cpu
