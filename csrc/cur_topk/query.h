// Queries of a top-k scan: their values and error bounds as the scan reads them, and exact scores.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "cur_topk/cur_topk.h"
#include "isa/kernels.h"
#include "runtime/bytes.h"

namespace fastrerank::cpu {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t values_of(Precision storage, int width) {
    return storage == Precision::kInt8 ? (width + 3) / 4 * 4 : (width + 15) / 16 * 16;
}
inline int64_t tile_bytes_of(Precision storage, int width) {
    const int64_t size = storage == Precision::kFloat32 ? 4 : storage == Precision::kBFloat16 ? 2 : 1;
    return kCurTile * (values_of(storage, width) * size + 4);
}

struct Scored {
    float score;
    int32_t id;
};
inline bool before(const Scored& a, const Scored& b) {
    return a.score > b.score || (a.score == b.score && a.id < b.id);
}

// Exact scores of items, by id.
class Exact {
public:
    Exact(const Kernels& kernels, const CurTopk& g)
        : kernels_(kernels),
          g_(g),
          values_(values_of(g.exact_storage, g.width)),
          bytes_(tile_bytes_of(g.exact_storage, g.width)) {
        int64_t first = 0;
        for (const CurShard& shard : g.shards) first_.push_back(first), first += shard.count;
    }
    int64_t width() const { return (values_ + 7) / 8 * 8; }  // values of a query

    // How many items ahead to prefetch.
    int64_t ahead() const { return std::clamp<int64_t>(kAheadBytes / (values_ * stride()), 1, 16); }

    // q: (width(),) with zeros in the padding; next: an item whose values are prefetched meanwhile.
    float score(const double* q, int32_t id, int32_t next) const {
        const auto [shard, at] = place(id);
        const char* tile = shard->exact + at / kCurTile * bytes_;
        const double product =
            kernels_.cur_exact(g_.exact_storage, tile, static_cast<int>(at % kCurTile), values_, q, values_at(next));
        const bool scaled = g_.exact_storage == Precision::kInt8 && shard->scale;
        return static_cast<float>(scaled ? product * shard->scale[at] : product);
    }

    void prefetch(int32_t id) const {
#if defined(__GNUC__)
        const char* from = values_at(id);
        for (int64_t i = 0; i < values_ * stride(); i += 64) __builtin_prefetch(from + i, 0, 2);
#endif
    }

private:
    static constexpr int64_t kAheadBytes = 16384;
    // Average bytes from one value of an item to the next in a tile.
    int64_t stride() const {
        return g_.exact_storage == Precision::kInt8 ? kCurTile : g_.exact_storage == Precision::kFloat32 ? 4 : 2;
    }
    const char* values_at(int32_t id) const {
        const auto [shard, at] = place(id);
        const int64_t row = g_.exact_storage == Precision::kInt8 ? 4 : values_ * stride();
        return shard->exact + at / kCurTile * bytes_ + at % kCurTile * row;
    }
    std::pair<const CurShard*, int64_t> place(int32_t id) const {
        const size_t s = std::upper_bound(first_.begin(), first_.end(), id) - first_.begin() - 1;
        return {&g_.shards[s], id - first_[s]};
    }
    const Kernels& kernels_;
    const CurTopk& g_;
    const int64_t values_, bytes_;
    std::vector<int64_t> first_;
};

// Queries as the scan reads them: score = unit * product.
struct Prepared {
    int64_t ld;
    Bytes q;
    std::vector<int32_t> start;
    std::vector<float> slack, spread, constant;
    std::vector<double> unit, exact;  // exact: (rows, width of Exact)

    Prepared(const CurTopk& g, int64_t begin, int64_t rows, int64_t exact_values)
        : ld(g.storage == Precision::kInt8 ? (g.width + 63) / 64 * 64 : values_of(g.storage, g.width)),
          q((rows + 31) / 32 * 32 * ld * (g.storage == Precision::kInt8 ? 1 : sizeof(float))),
          start(rows),
          slack(rows),
          spread(rows),
          constant(rows),
          unit(rows),
          exact(rows * exact_values) {
        std::fill_n(q.get(), q.size(), '\0');
        std::vector<double> folded(g.width);
        for (int64_t r = 0; r < rows; ++r) {
            const float* row = g.queries + (begin + r) * g.width;
            for (int i = 0; i < g.width; ++i)
                folded[i] = static_cast<double>(row[i]) * (g.anchor_scale ? g.anchor_scale[i] : 1.0);
            const bool of_scanned = g.exact_storage == Precision::kInt8;  // then the scanned tiles are the exact ones
            for (int i = 0; i < g.width; ++i) exact[r * exact_values + i] = of_scanned ? folded[i] : row[i];
            double norm = 0, largest = 0;
            for (const double x : folded) norm += x * x, largest = std::max(largest, std::fabs(x));
            norm = std::sqrt(norm) * (1 + 1e-12);
            double relative, absolute, residual = 0;
            if (g.storage == Precision::kInt8) {
                // |q . v - unit * q8 . v| <= |q - unit * q8| |v|, plus the rounding of sums and bounds in float32.
                unit[r] = largest > 0 ? largest / 127 : 1.0;
                int8_t* to = q.as<int8_t>() + r * ld;
                double error = 0, rounded = 0;
                int32_t sum = 0;
                for (int i = 0; i < g.width; ++i) {
                    const double exact_value = folded[i] / unit[r];
                    to[i] = static_cast<int8_t>(std::lrint(exact_value));
                    const double value = to[i], gone = exact_value - value;
                    error += gone * gone, rounded += value * value, sum += to[i];
                }
                start[r] = -128 * sum;
                relative = std::sqrt(error) + 8 * 0x1p-24 * std::sqrt(rounded);
                absolute = 0;
                if (g.rounded) {
                    // The scanned item differs from the exact one by its residual, in units of its scale. With bfloat16
                    // tiles, each value also has an error of 2^-9 relative to the value, or 2^-8 of the scale.
                    residual = norm / unit[r];
                    if (g.exact_storage == Precision::kBFloat16) {
                        relative += 0x1.02p-9 * residual;
                        absolute = 0x1.02p-8 * std::sqrt(static_cast<double>(g.width)) * residual;
                        residual *= 1 + 0x1.02p-9;
                    }
                }
            } else {
                // |q| is scaled to about 1 so that nothing overflows. Sums of w products have an error of at most (w +
                // 8) 2^-24 |q| |v|, plus that of denormals.
                const int exponent = norm > 0 ? std::ilogb(norm) : 0;
                unit[r] = std::ldexp(1.0, exponent);
                float* to = q.as<float>() + r * ld;
                for (int i = 0; i < g.width; ++i) to[i] = static_cast<float>(std::ldexp(folded[i], -exponent));
                relative = (g.width + 16) * 0x1.01p-24 * std::ldexp(norm, -exponent);
                absolute = g.width * 0x1p-123;
            }
            slack[r] = static_cast<float>(relative * 1.0001);
            spread[r] = static_cast<float>(residual * 1.0001);
            constant[r] = static_cast<float>(absolute * 1.0001);
        }
    }

    // The product that an item must reach if k items have scores of at least `product` units. It is a little lower: an
    // item whose float32 score may equal the least of theirs must stay, because the lower id wins a tie.
    float relaxed(int64_t r, double product) const {
        const double score = product * unit[r];
        if (!(score >= -FLT_MAX)) return -kInfinity;
        double least = std::min(score, static_cast<double>(FLT_MAX) * (1 - 0x1p-20));
        least -= std::fabs(least) * 0x1p-22 + 0x1p-146;
        const float value = static_cast<float>(least / unit[r]);
        return std::isinf(value) && value > 0 ? FLT_MAX : std::nextafter(value, -kInfinity);
    }
};

}  // namespace fastrerank::cpu
