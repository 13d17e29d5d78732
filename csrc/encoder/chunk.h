// A chunk of documents on its way through the encoder. Only the encoder's files include this header.
#pragma once
#include <cstring>
#include <vector>

#include "encoder/encoder.h"

namespace fastrerank::cpu {

// Parts of a chunk have a multiple of this many rows; every level's row tile divides it.
constexpr int kPartRows = 24;

// The stride, in values, of a product's inputs. A row of terms is an odd number of cache lines, so that the rows of a
// tile spread over all sets of the first-level cache, from where each block of columns reads them again.
constexpr int64_t row_stride(Format f, int64_t columns) {
    return f == Format::kTerms ? (columns + 31) / 32 * 32 | 32 : columns;
}

// Buffers of one chunk in flight. They are zeroed when they are allocated, so padding columns are finite.
struct Encoder::Workspace {
    Bytes x, input, input_scale, k, v, q, context, context_f32, wide, gate, wide_input, context_scale, scratch, head0,
        head1, ids, positions, types, down_scale, v_input, v_scale, strip_input, other_input;

    // A buffer for `rows` rows of `columns` values, rounded up to a product's row tile.
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

// `rows` rows of the residual stream and the documents that they belong to. Document i has `queries[i]` consecutive
// rows from `row[i]` on, the first at position `start[i]`; its keys are the rows [key_row[i], key_row[i] + keys[i]) of
// k and v. In a part of a chunk, the pointers to rows, except k and v, start at the chunk's row `begin`.
struct Encoder::Chunk {
    std::vector<int> document, key_row, keys, row, queries, start;
    std::vector<int64_t> token;  // where the document's tokens start in the request
    int tokens = 0;              // rows of k and v
    int begin = 0;
    int rows = 0;                // rows of x
    Workspace* w = nullptr;
    float* x = nullptr;          // (rows, padded(hidden)) residual stream
    char* input =
        nullptr;  // (rows, padded(hidden)) inputs of the products; x itself for float32 with norms after each block
    RowScale* input_scale = nullptr;
    char* v_input = nullptr;  // (rows, padded(hidden)) inputs of v's product: `input`, unless they have factors
    RowScale* v_scale = nullptr;
    char *k = nullptr, *v = nullptr;  // (tokens, heads * head_dim)
    int32_t *ids = nullptr, *positions = nullptr, *types = nullptr;
};

}  // namespace fastrerank::cpu
