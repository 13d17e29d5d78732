#include "max_sim/max_sim.h"

#include <algorithm>
#include <stdexcept>

#include "isa/kernels.h"
#include "runtime/bytes.h"
#include "runtime/parallel.h"

namespace fastrerank::cpu {

void run_max_sim(const Kernels& k, const float* query, int query_tokens, int dim, const float* tokens,
                 const int64_t* offsets, int documents, int threads, float* out) {
    const Bytes packed(k.packed_bytes(Precision::kFloat32, query_tokens, dim));
    if (!k.pack(Precision::kFloat32, query, Source::kF32, dim, query_tokens, dim, packed.get(), nullptr, nullptr))
        throw std::invalid_argument("query has a value that is NaN or infinite");
    // A document's value depends on its own rows only, so any split gives the same result.
    constexpr int kPerTask = 16;
    run_parallel((documents + kPerTask - 1) / kPerTask, threads, [&](int i) {
        const Bytes best(padded(query_tokens) * sizeof(float));
        const int begin = i * kPerTask, count = std::min(kPerTask, documents - begin);
        k.max_sim(packed.get(), query_tokens, dim, tokens, dim, offsets + begin, count, best.as<float>(), out + begin);
    });
}

}  // namespace fastrerank::cpu
