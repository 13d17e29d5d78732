// The types that the interfaces of all CPU kernels share.
//
// Rules that hold for every kernel:
//   * Rows are row-major with a stride in elements, rounded up to `padded(n)`. Padding columns hold finite values and
//     are only ever multiplied by zero weights.
//   * A kernel neither allocates, throws, locks nor knows Python.
//   * A row's result depends on that row alone: each level adds in one fixed order, whichever tile the row falls in.
//
// The code of a level includes these headers too, so they include no standard templates (see level.inl).
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastrerank::cpu {

struct Kernels;

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
constexpr int kLevels = 5;
enum class Precision : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

// How an activation matrix is stored. kU8: round(x / scale) + zero, with a RowScale for each row. kTerms: three
// bfloat16 terms whose sum is the float32 value; a row's first terms are followed by its second terms, `ld` values
// further on, and by its third.
enum class Format : int { kF32 = 0, kBF16 = 1, kU8 = 2, kTerms = 3 };
struct RowScale {
    float scale;
    int32_t zero;
};

// How a checkpoint stores a weight or embedding tensor.
enum class Source : int { kF32 = 0, kF16 = 1, kBF16 = 2 };

enum class Activation : int { kIdentity = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kTanh = 4, kSilu = 5, kSigmoid = 6 };

constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
constexpr size_t bytes_of(Format f) {
    return f == Format::kF32 ? 4 : f == Format::kTerms ? 6 : f == Format::kBF16 ? 2 : 1;
}

}  // namespace fastrerank::cpu
