#include "label_logits/label_logits.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "isa/kernels.h"
#include "runtime/bytes.h"
#include "runtime/parallel.h"

namespace fastrerank::cpu {
namespace {

// Multiply-adds of a task: enough that starting it takes little time beside them.
constexpr int64_t kTaskProducts = 1 << 18;

void sort_labels(const float* logits, int labels, int32_t* order) {
    const auto key = [&](int32_t i) {
        return std::isnan(logits[i]) ? -std::numeric_limits<float>::infinity() : logits[i];
    };
    std::iota(order, order + labels, 0);
    std::sort(order, order + labels, [&](int32_t a, int32_t b) {
        const float x = key(a), y = key(b);
        return x > y || (x == y && a < b);
    });
}

}  // namespace

void run_label_logits(const Kernels& k, const LabelLogits& g, int32_t* order, int threads) {
    const int64_t products = static_cast<int64_t>(g.n) * (g.labels + 4);  // the norm's passes count as four labels
    const int64_t tiles = std::max<int64_t>(1, kTaskProducts / (products * kLabelRows));
    const int64_t share = std::min(tiles * kLabelRows, g.rows);
    const int tasks = static_cast<int>((g.rows + share - 1) / share);
    run_parallel(tasks, threads, [&](int i) {
        const Bytes scratch(kLabelRows * padded(g.n) * sizeof(float));
        const int64_t begin = i * share, end = std::min(begin + share, g.rows);
        k.label_logits(g, begin, end, scratch.as<float>());
        if (!order) return;
        for (int64_t r = begin; r < end; ++r) sort_labels(g.out + r * g.labels, g.labels, order + r * g.labels);
    });
}

}  // namespace fastrerank::cpu
