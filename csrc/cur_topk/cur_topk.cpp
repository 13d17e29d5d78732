#include "cur_topk/cur_topk.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>

#include "cur_topk/query.h"
#include "runtime/parallel.h"
#include "runtime/stop.h"

namespace fastrerank::cpu {
namespace {

constexpr int64_t kRunBytes = 1 << 18;        // of tiles that a thread takes at a time
constexpr int64_t kReservoirBytes = 64 << 20; // of all threads; limits how many queries share a pass
constexpr int64_t kMostQueries = 256;
constexpr int64_t kRescored = 64;             // candidates of a task
constexpr int64_t kBlockTiles = 6;            // a multiple of the tiles that any level takes at a time
constexpr int64_t kSampled = 2;               // the first of this many runs begins with a part of the sample
constexpr int64_t kSampledRuns = 64;          // with fewer runs there is no sample

// A reservoir begins small, so that it is cut back sooner and finds a threshold sooner. Where more items stay between
// the bounds, it grows, up to kGrowth times.
int64_t limit_of(int64_t wanted) { return 4 * wanted + 64; }
constexpr int kGrowth = 16;

struct Candidate {
    float upper, lower;
    int32_t id;
};

// Candidates of one query that one thread has found. When too many stay between the bounds, their exact scores are
// computed, and the best k are kept in `best`.
struct Reservoir {
    Bytes memory;
    CurReservoir view{};
    std::vector<Scored> best;

    void make(int64_t limit) {
        const int64_t capacity = limit + kCurBlock;
        memory = Bytes(capacity * 12);
        view = {memory.as<float>(),
                memory.as<float>() + capacity,
                reinterpret_cast<int32_t*>(memory.as<float>() + 2 * capacity),
                0,
                static_cast<int>(limit),
                -kInfinity};
    }

    // Enlarges the reservoir; `from` is its view.
    void grow(int64_t limit, CurReservoir& from) {
        const Bytes before = std::move(memory);
        make(limit);
        std::copy_n(from.upper, from.count, view.upper);
        std::copy_n(from.lower, from.count, view.lower);
        std::copy_n(from.ids, from.count, view.ids);
        view.count = from.count, view.threshold = from.threshold;
        from = view;
    }
};

class Pass {
public:
    Pass(const Kernels& kernels, const CurTopk& g, const Exact& exact, int64_t begin, int64_t rows, int threads)
        : kernels_(kernels),
          g_(g),
          exact_(exact),
          begin_(begin),
          rows_(rows),
          threads_(threads),
          queries_(g, begin, rows, exact.width()),
          thresholds_(new std::atomic<float>[rows]) {
        for (int64_t r = 0; r < rows; ++r) {
            thresholds_[r].store(-kInfinity);
            wanted_.push_back(g.k + excluded(r));
        }
        const int64_t bytes = tile_bytes_of(g.storage, g.width);
        const int64_t tiles = std::max<int64_t>(kRunBytes / bytes / kBlockTiles * kBlockTiles, kBlockTiles);
        int64_t first = 0;
        for (const CurShard& shard : g.shards) {
            const int64_t end = (shard.count + kCurTile - 1) / kCurTile;
            for (int64_t t = 0; t < end; t += tiles) runs_.push_back({&shard, first, t, std::min(t + tiles, end)});
            first += shard.count;
        }
    }

    CurFault run() {
        found_.resize(std::max<int64_t>(1, std::min<int64_t>(threads_, runs_.size())));
        if (!sample()) {
            scan_all(runs_, wanted_);
        } else {
            scan_all(rest_, wanted_);
            if (!confirmed()) scan_all(runs_, wanted_);
        }
        if (rows_ >= threads_) {
            run_parallel(static_cast<int>(rows_), threads_, [&](int r) { finish(r, 1); });
        } else {
            for (int64_t r = 0; r < rows_; ++r) finish(r, threads_);
        }
        return fault_;
    }

private:
    // Tiles [begin, end) of a shard whose first item has the id `first`. The two halves are scanned side by side.
    struct Run {
        const CurShard* shard;
        int64_t first, begin, end;

        int64_t half() const { return (end - begin) / 2; }
        const char* tile(int64_t i, int64_t bytes) const { return shard->tiles + (begin + i) * bytes; }
    };

    int64_t excluded(int64_t r) const { return g_.left_out_begin[begin_ + r + 1] - g_.left_out_begin[begin_ + r]; }

    void scan_all(const std::vector<Run>& runs, const std::vector<int64_t>& ranks) {
        const int threads = static_cast<int>(found_.size());
        std::atomic<size_t> next{0};
        run_parallel(threads, threads, [&](int t) { scan(found_[t], runs, ranks, next); });
    }

    // Estimates a threshold for each query from a sample that is spread over all items: a score that, very likely, the
    // wanted number of all items reach, judging by the number of sampled items that reach it. Returns false where a
    // sample would not pay.
    bool sample() {
        if (runs_.size() < kSampledRuns) return false;
        std::vector<Run> sample;
        int64_t tiles = 0, all = 0;
        for (size_t i = 0; i < runs_.size(); ++i) {
            const Run& run = runs_[i];
            const int64_t end = i % kSampled ? run.begin : std::min(run.begin + kBlockTiles, run.end);
            all += run.end - run.begin, tiles += end - run.begin;
            if (end > run.begin) sample.push_back({run.shard, run.first, run.begin, end});
            if (end < run.end) rest_.push_back({run.shard, run.first, end, run.end});
        }
        ranks_ = wanted_;
        bool any = false;
        for (int64_t r = 0; r < rows_; ++r) {
            const double mean = static_cast<double>(wanted_[r]) * static_cast<double>(tiles) / static_cast<double>(all);
            const auto rank = static_cast<int64_t>(mean + 4 * std::sqrt(mean) + 4);
            if (2 * rank < wanted_[r]) ranks_[r] = rank, any = true;
        }
        if (!any) return false;
        scan_all(sample, ranks_);
        for (int64_t r = 0; r < rows_; ++r)
            if (ranks_[r] < wanted_[r]) raise(r, reached(r, ranks_[r]));
        for (int64_t r = 0; r < rows_; ++r) supposed_.push_back(thresholds_[r].load());
        return true;
    }

    // Checks the estimated thresholds. If one was too high, drops all candidates but keeps the thresholds that the best
    // items prove.
    bool confirmed() {
        bool all = true;
        std::vector<float> reached_by(rows_);
        for (int64_t r = 0; r < rows_; ++r) {
            reached_by[r] = reached(r, wanted_[r]);
            all &= ranks_[r] == wanted_[r] || reached_by[r] >= supposed_[r];
        }
        for (int64_t r = 0; r < rows_; ++r) thresholds_[r].store(reached_by[r]);
        if (all) return true;
        for (std::vector<Reservoir>& thread : found_) thread.clear();
        return false;
    }

    // The threshold that `rank` of the items found so far reach; -infinity if there are fewer.
    float reached(int64_t r, int64_t rank) const {
        std::vector<float> lower;
        for (const std::vector<Reservoir>& thread : found_) {
            const CurReservoir& view = thread[r].view;
            lower.insert(lower.end(), view.lower, view.lower + view.count);
            for (const Scored& s : thread[r].best)
                lower.push_back(std::nextafter(static_cast<float>(s.score / queries_.unit[r]), -kInfinity));
        }
        if (static_cast<int64_t>(lower.size()) < rank) return -kInfinity;
        const int n = static_cast<int>(lower.size());
        return queries_.relaxed(r, kernels_.kth_largest(lower.data(), n, static_cast<int>(rank)));
    }

    void scan(std::vector<Reservoir>& found, const std::vector<Run>& runs, const std::vector<int64_t>& ranks,
              std::atomic<size_t>& next) {
        if (found.empty()) {
            found.resize(rows_);
            for (int64_t r = 0; r < rows_; ++r) found[r].make(limit_of(ranks[r]));
        }
        std::vector<CurReservoir> views(rows_);
        for (int64_t r = 0; r < rows_; ++r) {
            views[r] = found[r].view;
            if (views[r].limit < limit_of(ranks[r])) found[r].grow(limit_of(ranks[r]), views[r]);
        }
        CurScan scan{};
        scan.storage = g_.storage;
        scan.tile_bytes = tile_bytes_of(g_.storage, g_.width);
        scan.width = static_cast<int>(values_of(g_.storage, g_.width)), scan.ldq = queries_.ld;
        scan.queries = static_cast<int>(rows_);
        scan.q = queries_.q.get(), scan.start = queries_.start.data();
        scan.slack = queries_.slack.data(), scan.spread = queries_.spread.data();
        scan.constant = queries_.constant.data();
        scan.reservoirs = views.data();
        for (size_t i; (i = next.fetch_add(1)) < runs.size();) {
            check_stop();
            // The next run of this thread is likely the one after a run for each other thread. If not, its tiles are
            // prefetched in vain.
            const Run &run = runs[i], &then = runs[std::min(next.load() + found_.size() - 1, runs.size() - 1)];
            scan.tiles = run.shard->tiles, scan.scale = run.shard->scale, scan.count = run.shard->count;
            scan.first = static_cast<int32_t>(run.first);
            scan.then[0] = then.tile(0, scan.tile_bytes), scan.then[1] = then.tile(then.half(), scan.tile_bytes);
            for (int64_t r = 0; r < rows_; ++r)
                views[r].threshold = std::max(views[r].threshold, thresholds_[r].load(std::memory_order_relaxed));
            const int64_t middle = run.begin + run.half();
            for (int64_t at = run.begin; at < run.end;) {
                scan.apart = at < middle ? run.half() : 0;
                at = kernels_.cur_scan(scan, at, at < middle ? middle : run.end);
                if (at == middle) at += run.half();
                for (int64_t r = 0; r < rows_; ++r)
                    if (views[r].count > views[r].limit) prune(r, ranks[r], views[r], found[r]);
            }
        }
        for (int64_t r = 0; r < rows_; ++r) found[r].view = views[r];
    }

    void raise(int64_t r, float threshold) {
        float shared = thresholds_[r].load(std::memory_order_relaxed);
        while (shared < threshold && !thresholds_[r].compare_exchange_weak(shared, threshold)) {
        }
    }
    void raise(int64_t r, float threshold, CurReservoir& v) {
        v.threshold = std::max(v.threshold, threshold);
        raise(r, v.threshold);
    }

    void prune(int64_t r, int64_t rank, CurReservoir& v, Reservoir& reservoir) {
        std::vector<Scored>& best = reservoir.best;
        raise(r, queries_.relaxed(r, kernels_.kth_largest(v.lower, v.count, static_cast<int>(rank))), v);
        int kept = 0;
        for (int i = 0; i < v.count; ++i) {
            v.upper[kept] = v.upper[i], v.lower[kept] = v.lower[i], v.ids[kept] = v.ids[i];
            kept += !(v.upper[i] < v.threshold);
        }
        v.count = kept;
        if (kept <= v.limit / 2) return;
        if (v.limit < kGrowth * limit_of(rank)) return reservoir.grow(2 * v.limit, v);
        if (kept <= v.limit / 4 * 3) return;
        const int ahead = static_cast<int>(exact_.ahead());
        for (int i = 0; i < kept; ++i)
            best.push_back(rescored(r, {v.upper[i], v.lower[i], v.ids[i]}, v.ids[std::min(i + ahead, kept - 1)]));
        v.count = 0;
        if (static_cast<int64_t>(best.size()) < wanted_[r]) return;
        std::nth_element(best.begin(), best.begin() + (wanted_[r] - 1), best.end(), before);
        best.resize(wanted_[r]);
        raise(r, queries_.relaxed(r, best[wanted_[r] - 1].score / queries_.unit[r]), v);
    }

    Scored rescored(int64_t r, const Candidate& c, int32_t next) {
        const float score = exact_.score(queries_.exact.data() + r * exact_.width(), c.id, next);
        if (std::isnan(score)) report(CurFault::kNaN, r, c.id);
        const double product = score / queries_.unit[r], room = std::fabs(product) * 0x1p-20 + 1e-30;
        if (g_.rounded && (product > c.upper + room || product < c.lower - room))
            report(CurFault::kOtherItems, r, c.id);
        return {score, c.id};
    }

    void report(CurFault::Kind kind, int64_t r, int32_t item) {
        const std::lock_guard<std::mutex> lock(fault_mutex_);
        if (fault_.kind == CurFault::kNone) fault_ = {kind, begin_ + r, item};
    }

    void finish(int64_t r, int threads) {
        const int64_t* left_out = g_.left_out + g_.left_out_begin[begin_ + r];
        const auto allowed = [&](int32_t id) { return !std::binary_search(left_out, left_out + excluded(r), id); };
        const float threshold = thresholds_[r].load();
        std::vector<Candidate> open;
        std::vector<Scored> done;
        for (std::vector<Reservoir>& thread : found_) {
            Reservoir& from = thread[r];
            for (const Scored& s : from.best)
                if (allowed(s.id)) done.push_back(s);
            for (int i = 0; i < from.view.count; ++i)
                if (!(from.view.upper[i] < threshold) && allowed(from.view.ids[i]))
                    open.push_back({from.view.upper[i], from.view.lower[i], from.view.ids[i]});
            from = Reservoir();
        }
        if (static_cast<int64_t>(open.size()) > g_.k) {
            std::nth_element(open.begin(), open.begin() + (g_.k - 1), open.end(),
                             [](const Candidate& a, const Candidate& b) { return a.lower > b.lower; });
            const float least = queries_.relaxed(r, open[g_.k - 1].lower);
            open.erase(std::remove_if(open.begin(), open.end(), [&](const Candidate& c) { return c.upper < least; }),
                       open.end());
        }
        // The most likely candidates are rescored first. Those that the k-th best exact score then rules out are
        // skipped.
        const int64_t first = std::min<int64_t>(g_.k, open.size());
        if (first < static_cast<int64_t>(open.size()))
            std::nth_element(open.begin(), open.begin() + first, open.end(),
                             [](const Candidate& a, const Candidate& b) { return a.upper > b.upper; });
        rescore(r, open, 0, first, done, threads);
        const int64_t k = std::min<int64_t>(g_.k, done.size());
        if (k == g_.k && first < static_cast<int64_t>(open.size())) {
            std::nth_element(done.begin(), done.begin() + (k - 1), done.end(), before);
            const float least = queries_.relaxed(r, done[k - 1].score / queries_.unit[r]);
            const auto end = std::partition(open.begin() + first, open.end(),
                                            [&](const Candidate& c) { return !(c.upper < least); });
            rescore(r, open, first, end - open.begin(), done, threads);
        }
        const int64_t given = std::min<int64_t>(g_.k, done.size());
        if (given < static_cast<int64_t>(done.size()))
            std::nth_element(done.begin(), done.begin() + given, done.end(), before);
        std::sort(done.begin(), done.begin() + given, before);
        for (int64_t i = 0; i < given; ++i) {
            g_.ids[(begin_ + r) * g_.k + i] = done[i].id;
            g_.scores[(begin_ + r) * g_.k + i] = done[i].score;
        }
        std::fill_n(g_.ids + (begin_ + r) * g_.k + given, g_.k - given, -1);
        std::fill_n(g_.scores + (begin_ + r) * g_.k + given, g_.k - given, -kInfinity);
    }

    void rescore(int64_t r, const std::vector<Candidate>& open, int64_t begin, int64_t end, std::vector<Scored>& done,
                 int threads) {
        const size_t done_before = done.size();
        done.resize(done_before + (end - begin));
        Scored* out = done.data() + done_before;
        run_parallel(static_cast<int>((end - begin + kRescored - 1) / kRescored), threads, [&](int task) {
            const int64_t from = begin + task * kRescored, to = std::min(from + kRescored, end);
            const int64_t ahead = exact_.ahead();
            for (int64_t i = from; i < std::min(from + ahead, to); ++i) exact_.prefetch(open[i].id);
            for (int64_t i = from; i < to; ++i)
                out[i - begin] = rescored(r, open[i], open[std::min(i + ahead, end - 1)].id);
        });
    }

    const Kernels& kernels_;
    const CurTopk& g_;
    const Exact& exact_;
    const int64_t begin_, rows_;
    const int threads_;
    const Prepared queries_;
    const std::unique_ptr<std::atomic<float>[]> thresholds_;  // proved by one thread, valid for all
    std::vector<int64_t> wanted_,
        ranks_;  // ranks_: the rank in the sample that stands for `wanted_`; equal to it without a sample
    std::vector<float> supposed_;          // estimated thresholds, not yet confirmed
    std::vector<Run> runs_, rest_;  // rest_: without the sample
    std::vector<std::vector<Reservoir>> found_;  // by thread and query
    CurFault fault_;
    std::mutex fault_mutex_;
};

}  // namespace

CurFault run_cur_topk(const Kernels& kernels, const CurTopk& g, int threads) {
    for (int64_t i = 0; i < g.rows * g.width; ++i)
        if (!std::isfinite(g.queries[i])) return {CurFault::kQuery, i / g.width, i % g.width};
    const Exact exact(kernels, g);
    int64_t most = g.k;
    for (int64_t r = 0; r < g.rows; ++r) most = std::max(most, g.k + g.left_out_begin[r + 1] - g.left_out_begin[r]);
    const int64_t one = 12 * (limit_of(most) + kCurBlock) * threads;
    const int64_t share = std::clamp<int64_t>(kReservoirBytes / one, 1, kMostQueries);
    for (int64_t begin = 0; begin < g.rows; begin += share) {
        Pass pass(kernels, g, exact, begin, std::min(share, g.rows - begin), threads);
        const CurFault fault = pass.run();
        if (fault.kind != CurFault::kNone) return fault;
    }
    return {};
}

}  // namespace fastrerank::cpu
