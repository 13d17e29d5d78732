// Passes over an encoder's rows: layer norm, conversion to a product's inputs, rotary embedding, sum of embeddings.
#pragma once
#include "isa/types.h"

namespace fastrerank::cpu {

// Rows of float32 in the format that a product reads; columns [0, padded(n)) are written.
struct Stored {
    void* q;                        // null: not wanted
    int64_t ldq;
    RowScale* scale = nullptr;      // (rows,), kU8 only
    const float* factor = nullptr;  // (padded(n),) factors of columns before rounding, or null; kU8 only
    Format format;
};

// y = (x - mean) / sqrt(var + eps) * gamma + beta, stored as float32 and as up to two products' inputs.
struct LayerNorm {
    const float* x;
    int64_t ldx;
    int rows, n;
    const float *gamma, *beta;  // (padded(n),), zero in the padding; beta may be null
    float eps;
    float* y;  // may be x itself
    int64_t ldy;
    Stored inputs[2] = {};
};

// x = word[id] + position[pos] + type[type_id]; null tables are left out.
struct Embed {
    const int32_t *ids, *positions, *types;
    const void* word;  // (vocabulary, n) as stored in the checkpoint
    Source word_source;
    const float *position, *type;  // (.., padded(n))
    int rows, n;
    float* x;
    int64_t ldx;
};

}  // namespace fastrerank::cpu
