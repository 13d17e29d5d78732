// What a chunk of documents is made of while it goes through an encoder; for the encoder's own files.
#pragma once
#include <cstring>
#include <vector>

#include "encoder/encoder.h"

namespace fastrerank::cpu {

// Rows of a part of a chunk come in multiples of this, which every level's row tile divides.
constexpr int kPartRows = 24;

// Values from one row of a product's inputs to the next. A row of terms is an odd number of lines: then the rows of a
// tile, which all rows of a block of columns read again, spread over all sets of the first-level cache.
constexpr int64_t row_stride(Format f, int64_t columns) {
    return f == Format::kTerms ? (columns + 31) / 32 * 32 | 32 : columns;
}

// Buffers of one chunk in flight. Zeroed when made: padding columns stay finite whatever was there before.
struct Encoder::Workspace {
    Bytes x, input, input_scale, k, v, q, context, context_f32, wide, gate, wide_input, context_scale, scratch, head0,
        head1, ids, positions, types, down_scale, v_input, v_scale, strip_input, other_input;

    // Room for `rows` rows of `columns` values, and for the tile that a product rounds them up to.
    template <class T = char>
    static T* need(Bytes& b, int64_t rows, int64_t columns = 1) {
        const size_t bytes = static_cast<size_t>(rows + kRowTile) * columns * sizeof(T);
        if (b.size() < bytes) {
            b = Bytes();  // release before asking for more
            b = Bytes(bytes);
            std::memset(b.get(), 0, bytes + 64);
        }
        return b.as<T>();
    }
};

// Rows `rows` of the state, and whose they are: document i has `queries[i]` consecutive rows from `row[i]`, the first
// standing at position `start[i]`; its keys are rows [key_row[i], key_row[i] + keys[i]) of k and v. A part of a chunk
// is one whose pointers to rows, but not k and v, start at the chunk's row `begin`.
struct Encoder::Chunk {
    std::vector<int> document, key_row, keys, row, queries, start;
    std::vector<int64_t> token;  // where the document's tokens start in the request
    int tokens = 0;              // rows of k and v
    int begin = 0;
    int rows = 0;                // rows of x
    Workspace* w = nullptr;
    float* x = nullptr;          // (rows, padded(hidden)) residual stream
    char* input = nullptr;       // (rows, padded(hidden)) what the products read; x itself for float32 post-norm
    RowScale* input_scale = nullptr;
    char* v_input = nullptr;     // (rows, padded(hidden)) what v reads: `input`, unless its columns have factors
    RowScale* v_scale = nullptr;
    char *k = nullptr, *v = nullptr;  // (tokens, heads * head_dim)
    int32_t *ids = nullptr, *positions = nullptr, *types = nullptr;
};

}  // namespace fastrerank::cpu
