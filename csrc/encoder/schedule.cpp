// Deals a request to threads: chunks of whole documents, and rows of the last chunks where threads would be idle.
#include <pthread.h>

#include <algorithm>
#include <functional>
#include <mutex>
#include <numeric>
#include <utility>

#include "encoder/chunk.h"
#include "runtime/parallel.h"
#include "runtime/stop.h"

namespace fastrerank::cpu {
namespace {

// One mutex for the idle workspaces of all encoders, which a fork locks: in a child that is forked while another thread
// holds the mutex, nobody could unlock it.
std::mutex idle_mutex;
[[maybe_unused]] const int registered =
    pthread_atfork([] { idle_mutex.lock(); }, [] { idle_mutex.unlock(); }, [] { idle_mutex.unlock(); });

// The cost of the barriers between a chunk's parts, in tokens of one thread: two a layer, each some 10 us.
constexpr int64_t kMeetings = 32;

// How many of the last chunks are best split over all threads, one after the other, when the others are done, because
// they would keep some threads waiting. `tokens` are the chunks' tokens, longest first. Never all of them: a thread
// that must first wake up would be late for its part of a layer.
int split_chunks(const std::vector<int64_t>& tokens, int threads) {
    const int n = static_cast<int>(tokens.size());
    const int most = threads > 1 ? std::min(n - threads, 2 * threads - 1) : 0;
    int best = 0;
    int64_t least = 0, split = 0;  // when the best choice ends; the time of splitting the chunks from the i-th on
    for (int i = std::max(n - most, 0); i < n; ++i) split += tokens[i] / threads + kMeetings;
    std::vector<int64_t> busy(threads);
    for (int i = 0; i <= n; ++i) {
        const int64_t end = *std::max_element(busy.begin(), busy.end()) + split;
        if (n - i <= most && (i == n - most || end <= least)) {
            best = n - i;
            least = end;
        }
        if (i == n) break;
        *std::min_element(busy.begin(), busy.end()) += tokens[i];
        if (n - i <= most) split -= tokens[i] / threads + kMeetings;
    }
    return best;
}

}  // namespace

std::unique_ptr<Encoder::Workspace> Encoder::take_workspace() const {
    std::lock_guard<std::mutex> lock(idle_mutex);
    if (idle_.empty()) return std::make_unique<Workspace>();
    auto w = std::move(idle_.back());
    idle_.pop_back();
    return w;
}

void Encoder::forward(const int32_t* ids, const int32_t* types, const int64_t* offsets, int documents, Readout readout,
                      int threads, float* out) const {
    if (documents == 0) return;
    check(ids, types, offsets, documents);
    // The longest documents go first, each into the least filled bin. The number of bins is a multiple of `threads`, so
    // that threads end together.
    std::vector<int> order(documents);
    std::iota(order.begin(), order.end(), 0);
    const auto length = [&](int d) { return offsets[d + 1] - offsets[d]; };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return length(a) > length(b); });
    const int64_t per_wave = static_cast<int64_t>(chunk_tokens_) * threads;
    const int64_t bins = std::min<int64_t>(documents, (offsets[documents] + per_wave - 1) / per_wave * threads);
    std::vector<Chunk> chunks(bins);
    std::vector<std::pair<int64_t, int>> heap;  // (tokens, bin), smallest first
    for (int b = 0; b < bins; ++b) heap.emplace_back(0, b);
    for (const int d : order) {
        std::pop_heap(heap.begin(), heap.end(), std::greater<>());
        auto& [tokens, bin] = heap.back();
        Chunk& c = chunks[bin];
        c.document.push_back(d);
        c.token.push_back(offsets[d]);
        c.key_row.push_back(c.tokens);
        c.keys.push_back(static_cast<int>(length(d)));
        c.tokens += static_cast<int>(length(d));
        tokens += length(d);
        std::push_heap(heap.begin(), heap.end(), std::greater<>());
    }
    std::stable_sort(chunks.begin(), chunks.end(), [](const Chunk& a, const Chunk& b) { return a.tokens > b.tokens; });

    const auto run = [&](Chunk& c, int team) {
        std::unique_ptr<Workspace> w = take_workspace();
        c.w = w.get();
        c.ids = Workspace::need<int32_t>(w->ids, c.tokens);
        c.positions = Workspace::need<int32_t>(w->positions, c.tokens);
        c.types = Workspace::need<int32_t>(w->types, c.tokens);
        for (size_t d = 0; d < c.document.size(); ++d) {
            int next = config_.position_offset;
            for (int t = 0; t < c.keys[d]; ++t) {
                const int row = c.key_row[d] + t;
                c.ids[row] = ids[c.token[d] + t];
                c.positions[row] = c.ids[row] == config_.pad_id ? config_.pad_id : next++;
                c.types[row] = types && !type_.empty() ? types[c.token[d] + t] : 0;
            }
        }
        run_chunk(c, readout, team, out);
        give_back(std::move(w), threads);
    };
    std::vector<int64_t> tokens;
    for (const Chunk& c : chunks) tokens.push_back(c.tokens);
    const int whole = static_cast<int>(bins) - split_chunks(tokens, threads);
    run_parallel(whole, threads, [&](int i) { run(chunks[i], 1); });
    for (int i = whole; i < bins; ++i) {
        check_stop();
        run(chunks[i], threads);
    }
}

void Encoder::give_back(std::unique_ptr<Workspace> w, int threads) const {
    std::lock_guard<std::mutex> lock(idle_mutex);
    if (idle_.size() < static_cast<size_t>(threads)) idle_.push_back(std::move(w));
}

// `count` parts of about equal size, each with its own workspace. They begin at multiples of every level's row tile, so
// that no product touches another part's rows.
std::vector<Encoder::Chunk> Encoder::split(const Chunk& c, int count) const {
    const int64_t width = padded(config_.hidden);
    const int rows = ((c.rows + count - 1) / count + kPartRows - 1) / kPartRows * kPartRows;
    std::vector<Chunk> parts;
    for (int begin = 0; begin < c.rows; begin += rows) {
        Chunk& p = parts.emplace_back();
        p.begin = begin;
        p.rows = std::min(rows, c.rows - begin);
        p.tokens = c.tokens;
        for (size_t d = 0; d < c.document.size(); ++d) {
            const int from = std::max(c.row[d], begin), to = std::min(c.row[d] + c.queries[d], begin + p.rows);
            if (from >= to) continue;
            p.document.push_back(c.document[d]);
            p.key_row.push_back(c.key_row[d]);
            p.keys.push_back(c.keys[d]);
            p.row.push_back(from - begin);
            p.queries.push_back(to - from);
            p.start.push_back(from - c.row[d]);
        }
        p.x = c.x + begin * width;
        p.input_scale = c.input_scale + begin;
        p.v_input = c.v_input + begin * width;
        p.v_scale = c.v_scale + begin;
        p.positions = c.positions + begin;
    }
    return parts;
}

// Takes a chunk through all layers and the head. With several threads its rows are split. All parts
// synchronise twice in each layer: after all keys and values are written, and after all are read.
void Encoder::run_chunk(Chunk& c, Readout readout, int threads, float* out) const {
    const EncoderConfig& g = config_;
    const int64_t width = padded(g.hidden), columns = g.heads * g.head_dim;
    embed(c);
    c.rows = c.tokens;
    c.row = c.key_row;
    c.queries = c.keys;
    c.start.assign(c.document.size(), 0);
    c.input_scale = Workspace::need<RowScale>(c.w->input_scale, c.tokens);
    c.v_input = Workspace::need(c.w->v_input, c.tokens, width);
    c.v_scale = Workspace::need<RowScale>(c.w->v_scale, c.tokens);
    if (!g.pre_norm) {
        c.input = input_of(c, layers_[0], nullptr);
        norm(c, Norm{}, 0, c.tokens, true, layers_[0], true, c.input);
    }
    std::vector<Chunk> parts;
    std::vector<std::unique_ptr<Workspace>> workspaces;
    if (threads > 1) {
        parts = split(c, threads);
        // The chunk does not use its own buffers meanwhile, so the first part takes its workspace.
        for (Chunk& p : parts) {
            p.w = c.w;
            if (p.begin == 0) continue;
            workspaces.push_back(take_workspace());
            p.w = workspaces.back().get();
        }
    }
    // Calls f(part, the part's rows of target), or with the whole chunk if it is not split.
    const auto each = [&](char* target, int64_t target_bytes, const auto& f) {
        if (parts.empty()) return f(c, target);
        run_parallel(static_cast<int>(parts.size()), threads,
                     [&](int i) { f(parts[i], target + parts[i].begin * target_bytes); });
    };
    const bool pruned = readout == Readout::kFirst || readout == Readout::kLast;
    for (int i = 0; i < g.layers; ++i) {
        check_stop();
        const Layer& l = layers_[i];
        const Layer& next = layers_[std::min(i + 1, g.layers - 1)];
        if (g.pre_norm) c.input = input_of(c, l, nullptr);
        c.k = Workspace::need(c.w->k, c.tokens, columns * bytes_of(l.attention));
        c.v = Workspace::need(c.w->v, c.tokens, columns * bytes_of(l.attention));
        for (Chunk& p : parts) {
            p.input = c.input + p.begin * row_stride(l.input, width) * bytes_of(l.input);
            p.k = c.k;
            p.v = c.v;
        }
        each(nullptr, 0, [&](Chunk& p, char*) { keys_and_values(p, i); });
        // Where the formats differ, the next layer's inputs would overwrite rows that are still to be read.
        char* target = c.input;
        if (!g.pre_norm && next.input != l.input) target = input_of(c, next, c.input);
        if (pruned && i + 1 == g.layers) {
            prune(c, i, readout);
            layer(c, i, target);
        } else {
            each(target, row_stride(next.input, width) * bytes_of(next.input),
                 [&](Chunk& p, char* to) { layer(p, i, to); });
        }
        c.input = target;
    }
    for (auto& w : workspaces) give_back(std::move(w), threads);
    if (g.pre_norm) k_.layer_norm(final_norm_.of(c.x, width, c.rows, g.hidden, g.eps, c.x, width));
    read(c, readout, out);
}

}  // namespace fastrerank::cpu
