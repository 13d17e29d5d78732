// Linear layers on packed weights: who owns the weights, and how rows are dealt to threads.
#pragma once
#include <memory>

#include "isa/kernels.h"
#include "runtime/bytes.h"

namespace fastrerank::cpu {

struct OwnedMatrix {
    std::shared_ptr<char> data;
    size_t bytes = 0;  // of data
    Bytes scale, sum, bias;
    PackedMatrix view{};

    // Packs w (n, ldw) into `memory`, which has packed_bytes(precision, n, k) bytes; bias (n,) may be null. Returns
    // false if a weight is not finite.
    bool pack(const Kernels& kernels, std::shared_ptr<char> memory, Precision precision, const void* w, Source source,
              int64_t ldw, int n, int k, const float* bias);
};

// y = x W^T + b through one level's packed product. Sums are float32; results are rounded once.
class PackedLinear {
public:
    // Throws std::invalid_argument if a weight is not finite.
    PackedLinear(const Kernels& kernels, Precision precision, const void* w, Source source, int64_t ldw, int n, int k,
                 const float* bias);

    const Kernels& kernels() const { return k_; }
    const PackedMatrix& view() const { return matrix_.view; }
    // The format in which `run` reads x and writes y; both have true sizes, without padding.
    Format stored() const;

    // x (rows, ldx) and y (rows, ldy). Throws std::invalid_argument for int8, whose rows have scales.
    void run(const char* x, int64_t ldx, int64_t rows, char* y, int64_t ldy, int threads) const;

    // A copy of rows of `from` as the product reads them, of stride padded(k), with zeros in the padding and the rows
    // of a row tile more.
    Bytes inputs_of(const char* from, int64_t ldx, int64_t rows) const;

private:
    const Kernels& k_;
    OwnedMatrix matrix_;
};

// y = down(act(gate(x))), or down(act(gate(x)) * up(x)) unless `up` is null. A block of rows goes through all products
// at once, and its intermediate rows are not rounded before they are multiplied. Throws std::invalid_argument for int8
// and for products that do not fit together.
void run_feed_forward(const PackedLinear& gate, const PackedLinear& down, const PackedLinear* up, Activation act,
                      const char* x, int64_t ldx, int64_t rows, char* y, int64_t ldy, int threads);

}  // namespace fastrerank::cpu
