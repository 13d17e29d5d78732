// y = x W^T + b on packed weights. The epilogue applies an activation, a factor and a residual.
#pragma once
#include "isa/types.h"

namespace fastrerank::cpu {

// W (n outputs, k inputs), packed for one level: panels of columns, k-major inside a panel.
struct PackedMatrix {
    Precision precision;
    int n, k;            // true sizes
    int n_padded;        // columns stored: n rounded up to a vector
    int k_padded;        // inputs stored: k rounded up to 4
    const char* data;    // panels
    const float* scale;  // (n_padded,) per output channel, int8 only
    const float* sum;    // (n_padded,) scale * sum over k of the quantised weights, int8 only
    const float* bias;   // (n_padded,), zeros where the layer has none
};

// Rows are processed in tiles of at most kRowTile. x, x_scale, mul and add are read, and y is written, for `rows`
// rounded up to it; the values of the rows beyond `rows` do not matter.
constexpr int kRowTile = 8;
struct Linear {
    const PackedMatrix* w = nullptr;
    const void* x;                    // (rows, ldx) in the format that w's precision reads
    const RowScale* x_scale = nullptr;  // (rows,), kU8 only
    int64_t ldx;
    int rows;
    Activation act = Activation::kIdentity;
    bool fast_act = false;  // polynomial GELU with error <= 1.8e-4, for outputs that are rounded to 8 or 16 bits
    const float* mul = nullptr;  // y *= mul (rows, ldy) after the activation, or null
    const float* add = nullptr;  // y += add (rows, ldy), or null
    void* y = nullptr;  // (rows, ldy), columns [0, n_padded) are written
    int64_t ldy;
    Format y_format = Format::kF32;  // kF32 or kBF16; kTerms where x is
    bool terms = false;  // x is kTerms, which float32 weights take where that is their input format
};

}  // namespace fastrerank::cpu
