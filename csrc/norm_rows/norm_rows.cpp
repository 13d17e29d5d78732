#include "norm_rows/norm_rows.h"

#include <algorithm>

#include "isa/kernels.h"
#include "runtime/bytes.h"
#include "runtime/parallel.h"

namespace fastrerank::cpu {

void run_norm_rows(const Kernels& k, const NormRows& g, void* y, int64_t ldy, int threads) {
    constexpr int64_t kTaskValues = 1 << 16;
    const int64_t rows = std::max<int64_t>(1, kTaskValues / std::max(g.n, 1));
    run_parallel(static_cast<int>((g.rows + rows - 1) / rows), threads, [&](int i) {
        Bytes scratch(padded(g.n) * sizeof(float));
        k.norm_rows(g, i * rows, std::min(g.rows, (i + 1) * rows), y, ldy, scratch.as<float>());
    });
}

}  // namespace fastrerank::cpu
