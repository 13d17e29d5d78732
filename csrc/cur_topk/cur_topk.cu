// Top-k of products of queries with packed items, on int8 and bfloat16 tiles (ops/_cur_topk/items.py), in five kernels.
// They round the queries; stream shares of the tiles, with a reservoir in each block's shared memory; merge the blocks'
// bests; compute exact scores of the rest; and sort those and check the bound of the items that were left out. For many
// queries of int8 items, the kernels of cuda_many.h scan instead. Every sum has one order and the order of entries is
// total, so results do not depend on timing.
#include <algorithm>
#include <type_traits>

#include "cur_topk/cuda_many.h"
#include "cur_topk/cuda_products.h"
#include "cur_topk/cuda_state.h"
#include "cur_topk/cuda_topk.h"
#include "cur_topk/reservoir.h"

namespace fastrerank::cuda {
namespace {

constexpr int kSteps = 4;  // a warp takes two tiles in a step
constexpr int kBatch = kThreads * kSteps;  // items of a block between two barriers
constexpr int kTogether = 4;  // queries that share a scan of int8 items
constexpr size_t kRoom = 96 << 10;  // bytes of shared memory for queries that share a scan
constexpr size_t kLists = size_t{64} << 20;  // bytes for the blocks' bests of one launch
constexpr size_t kReservoirs = size_t{192} << 20;  // bytes for the reservoirs of a scan for many queries

// Blocks per multiprocessor of a scan for this many queries.
constexpr int blocks_of(int queries) { return queries == 1 ? 3 : 2; }

__device__ __forceinline__ double query_value(const CurTopk& g, const float* query, int i) {
    return g.anchor ? static_cast<double>(query[i]) * g.anchor[i] : query[i];
}

// The sum, or the largest, of the threads' values, in the order of one tree.
template <bool Sum>
__device__ __forceinline__ double over_block(double own, double* parts) {
    parts[threadIdx.x] = own;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
        const int i = static_cast<int>(threadIdx.x);
        if (i < half) parts[i] = Sum ? parts[i] + parts[i + half] : fmax(parts[i], parts[i + half]);
        __syncthreads();
    }
    const double result = parts[0];
    __syncthreads();
    return result;
}

// One block rounds a query to 127ths of its largest value, or scales it to about 1 so that float32 sums do not
// overflow.
__global__ void __launch_bounds__(kThreads) prepare_kernel(CurTopk g, Scratch s) {
    __shared__ double parts[kThreads];
    const int row = static_cast<int>(blockIdx.x), words = words_of(g), first = static_cast<int>(threadIdx.x);
    const float* query = g.queries + static_cast<int64_t>(row) * g.width;
    uint32_t* rounded = s.rounded + static_cast<int64_t>(row) * words;
    bool finite = true;
    double largest = 0;
    for (int i = first; i < g.width; i += kThreads) {
        finite &= (bits_of(query[i]) & 0x7f800000u) != 0x7f800000u;
        if (finite) largest = fmax(largest, fabs(query_value(g, query, i)));
    }
    finite = !__syncthreads_or(!finite);
    largest = over_block<false>(largest, parts);
    if (largest == 0 || !finite) largest = 1;
    const double unit = g.int8 ? largest / 127 : ldexp(1.0, ilogb(largest));
    double rest = 0, norm = 0, sum = 0;  // sums of squared rounding errors, of squared values, of values
    for (int i = first; i < words * (g.int8 ? 4 : 1); i += kThreads) {
        const double inside = finite && i < g.width ? query_value(g, query, i) / unit : 0;
        double value = inside;
        if (g.int8) {
            value = fmin(fmax(rint(inside), -127.0), 127.0);
            reinterpret_cast<int8_t*>(rounded)[i] = static_cast<int8_t>(value);
        } else {
            reinterpret_cast<float*>(rounded)[i] = static_cast<float>(value);
        }
        rest += (inside - value) * (inside - value), norm += value * value, sum += value;
    }
    rest = over_block<true>(rest, parts), norm = over_block<true>(norm, parts), sum = over_block<true>(sum, parts);
    if (threadIdx.x != 0) return;
    // The error of int8: |q . v - unit * q8 . v| <= |q - unit * q8| |v|, and the rounding of sums times scales. The
    // error of bfloat16: that of float32 sums. `tiny` covers denormals.
    const double half = ldexp(1.0, -24), tiny = g.width * ldexp(1.0, -123);
    const double error = g.int8 ? sqrt(rest) + 8 * half * sqrt(norm) : (g.width + 16) * half * sqrt(norm);
    State state;
    state.floor = ~Entry{0}, state.published = 0;
    state.shift = g.int8 ? static_cast<int32_t>(128 * sum) : 0;
    state.unit = unit, state.error = unit * (error * g.reach + tiny) * 1.0001;
    s.states[row] = state;
    s.status[row] = finite ? 0 : kCurNotFinite;
}

// An entry below the k-th best item: when k entries are published, that is the one just below the least of them; until
// then kNoEntry. No block waits for another.
__device__ __forceinline__ Entry published_bound(State* state, int k) {
    if (atomicAdd(&state->published, 0u) < static_cast<unsigned>(k)) return kNoEntry;
    __threadfence();
    return atomicMin(reinterpret_cast<unsigned long long*>(&state->floor), ~0ull) - 1;
}

// Drops entries below a bound that was found after they were added. Returns how many stay, also in *count.
__device__ __forceinline__ int keep_from(Entry* entries, int filled, Entry bound, int* count) {
    const int thread = static_cast<int>(threadIdx.x);
    __syncthreads();
    if (thread == 0) *count = 0;
    for (int begin = 0; begin < filled; begin += kThreads) {
        const Entry e = begin + thread < filled ? entries[begin + thread] : kNoEntry;
        __syncthreads();  // only places that were already read are written
        if (e != kNoEntry && e >= bound) entries[atomicAdd(count, 1)] = e;
    }
    __syncthreads();
    return *count;
}

// `blocks` blocks scan for Q queries. Each holds the scores of its first batch back, and publishes the best of each of
// its `groups` (0, 1, 2, 4 or 8) parts. So there is a bound before reservoirs fill, and few items pass it.
template <bool Int8, int Q>
__global__ void __launch_bounds__(kThreads, blocks_of(Q))
    scan_kernel(CurTopk g, Scratch s, int begin_row, int rows, int blocks, int groups) {
    extern __shared__ uint4 memory[];
    Entry* shared = reinterpret_cast<Entry*>(memory);
    __shared__ int count[Q];
    __shared__ Entry bound[2][Q];  // double buffer: one is read while the other is written
    __shared__ Entry tops[Q][kWarps];
    const int size = reservoir_size(g.wanted, kBatch), words = words_of(g);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int group = static_cast<int>(blockIdx.x) / blocks, block = static_cast<int>(blockIdx.x) % blocks;
    const int first_row = begin_row + group * Q;
    const int live = min(Q, begin_row + rows - first_row);
    uint32_t* query = reinterpret_cast<uint32_t*>(shared + Q * size);
    int shift[Q];
#pragma unroll
    for (int q = 0; q < Q; ++q) {
        const uint32_t* own = s.rounded + static_cast<int64_t>(first_row + q) * words;
        for (int i = thread; i < words; i += kThreads) query[i * Q + q] = q < live ? own[i] : 0;
        shift[q] = q < live ? s.states[first_row + q].shift : 0;
        if (thread == 0) count[q] = 0, bound[0][q] = bound[1][q] = kNoEntry;
    }
    __syncthreads();

    constexpr int kApart = Int8 ? 4 : 1;
    const int part = Int8 ? lane / 4 : lane % 8;
    const int own = part / 4 * kTile + (Int8 ? lane % 4 * 4 + part % 4 : part % 4 * 4 + lane / 8);
    const int64_t batches = (g.count + kBatch - 1) / kBatch;
    float held[Q][kSteps];
    Entry bar[Q];
#pragma unroll
    for (int q = 0; q < Q; ++q) bar[q] = kNoEntry;
    bool full = false;
    const auto append = [&](int q, float score, int64_t item) {
        const Entry e = entry_of(score, static_cast<int32_t>(item));
        if (e <= bar[q]) return;
        const int place = atomicAdd(&count[q], 1);
        shared[q * size + place] = e;
        full |= place >= size - kBatch;
    };
    const auto item_of = [&](int64_t batch, int step) { return batch * kBatch + (warp * kSteps + step) * 32 + own; };
    int turn = 0;
    for (int64_t batch = block; batch < batches; batch += blocks) {
        const bool initial = batch == block;
        for (int step = 0; step < kSteps; ++step) {
            const int64_t item = item_of(batch, step), tile = (item - own) / kTile;
            const bool there = item < g.count;
            float scale = 1;
            if (Int8 && g.scale && there) scale = __ldg(g.scale + item);
            using Sum = std::conditional_t<Int8, int, float>;
            Sum sums[Q][8] = {};
            const char* p = g.tiles + tile * g.tile_bytes;
            if (tile * kTile < g.count) add_tile<Q, 0>(p, g.stored_width, query, lane, sums);
            if ((tile + 1) * kTile < g.count) add_tile<Q, 1>(p + g.tile_bytes, g.stored_width, query, lane, sums);
#pragma unroll
            for (int q = 0; q < Q; ++q) {
                const Sum sum = sum_over_lanes(sums[q], part, kApart);
                const float score = Int8 ? static_cast<float>(static_cast<int>(sum) - shift[q]) * scale : sum;
                if (initial) {
#pragma unroll
                    for (int j = 0; j < kSteps; ++j) held[q][j] = j == step ? score : held[q][j];
                } else if (there && q < live) {
                    append(q, score, item);
                }
            }
        }
        if (initial) {
#pragma unroll
            for (int q = 0; q < Q; ++q) {
                Entry top = kNoEntry;
#pragma unroll
                for (int j = 0; j < kSteps; ++j) {
                    const int64_t item = item_of(batch, j);
                    const Entry e = item < g.count ? entry_of(held[q][j], static_cast<int32_t>(item)) : kNoEntry;
                    top = e > top ? e : top;
                }
#pragma unroll
                for (int apart = 16; apart > 0; apart /= 2) {
                    const Entry other = __shfl_xor_sync(kAll, static_cast<unsigned long long>(top), apart);
                    top = other > top ? other : top;
                }
                if (lane == 0) tops[q][warp] = top;
            }
            __syncthreads();
            if (thread < groups * live) {
                const int q = thread / groups, warps = kWarps / groups;
                Entry top = kNoEntry;
                for (int i = 0; i < warps; ++i) top = max(top, tops[q][thread % groups * warps + i]);
                State* state = s.states + first_row + q;
                if (top != kNoEntry) {
                    atomicMin(reinterpret_cast<unsigned long long*>(&state->floor), top);
                    __threadfence();
                    atomicAdd(&state->published, 1u);
                }
            }
            continue;
        }
        turn ^= 1;
        if (thread < live) {
            const Entry last = bound[turn ^ 1][thread];
            const bool asks = groups && last == kNoEntry;
            bound[turn][thread] = asks ? published_bound(s.states + first_row + thread, g.wanted) : last;
        }
        if (__syncthreads_or(full)) {
            for (int q = 0; q < live; ++q) {
                const int filled = count[q];
                if (filled + kBatch <= size) continue;
                cut_back(shared + q * size, size, filled, thread, kThreads, BlockBarrier());
                if (thread == 0) {
                    count[q] = min(filled, g.wanted);
                    if (filled >= g.wanted) bound[turn][q] = max(bound[turn][q], shared[q * size + g.wanted - 1]);
                }
            }
            full = false;
            __syncthreads();
        }
#pragma unroll
        for (int q = 0; q < Q; ++q) bar[q] = bound[turn][q];
    }

    turn ^= 1;
    if (thread < live) {
        const Entry last = bound[turn ^ 1][thread];
        const bool asks = groups && last == kNoEntry;
        bound[turn][thread] = asks ? published_bound(s.states + first_row + thread, g.wanted) : last;
    }
    __syncthreads();
#pragma unroll
    for (int q = 0; q < Q; ++q) {
        bar[q] = bound[turn][q];
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            const int64_t item = item_of(block, j);
            if (block < batches && item < g.count && q < live) append(q, held[q][j], item);
        }
    }
    __syncthreads();
    for (int q = 0; q < live; ++q) {
        Entry* reservoir = shared + q * size;
        int filled = count[q];
        if (filled > kThreads) filled = keep_from(reservoir, filled, bound[turn][q], &count[q]);
        cut_back(reservoir, power_of_two(filled), filled, thread, kThreads, BlockBarrier());
        Entry* list = s.lists + (static_cast<int64_t>(first_row + q - begin_row) * blocks + block) * g.wanted;
        for (int i = thread; i < g.wanted; i += kThreads) list[i] = i < filled ? reservoir[i] : kNoEntry;
    }
}

struct BlockLanes {
    int lane, count;
    __device__ __forceinline__ void barrier() const { __syncthreads(); }
    __device__ __forceinline__ int add(int* n) const { return atomicAdd(n, 1); }
    __device__ __forceinline__ bool any(bool x) const { return __syncthreads_or(x); }
};

// One block for each query: the best of the blocks' bests.
__global__ void __launch_bounds__(kSortThreads) merge_kernel(CurTopk g, Scratch s, int begin_row, int blocks) {
    extern __shared__ Entry shared[];
    __shared__ int filled;
    __shared__ Entry threshold;
    if (threadIdx.x == 0) filled = 0, threshold = kNoEntry;
    __syncthreads();
    merge_lists(s.lists + static_cast<int64_t>(blockIdx.x) * blocks * g.wanted, blocks, g.wanted, shared,
                reservoir_size(g.wanted, kSortThreads), &filled, &threshold,
                BlockLanes{static_cast<int>(threadIdx.x), kSortThreads});
    Entry* found = s.found + (begin_row + static_cast<int64_t>(blockIdx.x)) * g.wanted;
    for (int i = static_cast<int>(threadIdx.x); i < g.wanted; i += kSortThreads) found[i] = shared[i];
}

// One warp for each item that was found: its score, a sum of float64 products that is rounded once.
template <bool Int8>
__global__ void __launch_bounds__(kThreads, 4) rescore_kernel(CurTopk g, Scratch s) {
    const int lane = static_cast<int>(threadIdx.x) % 32, blocks = (g.wanted + kWarps - 1) / kWarps;
    const int row = static_cast<int>(blockIdx.x) / blocks;
    const int i = static_cast<int>(blockIdx.x) % blocks * kWarps + static_cast<int>(threadIdx.x) / 32;
    if (i >= g.wanted) return;
    const int64_t place = static_cast<int64_t>(row) * g.wanted + i;
    const Entry found = s.found[place];
    if (found == kNoEntry) {
        if (lane == 0) s.exact[place] = kNoEntry;
        return;
    }
    const int32_t id = id_of(found);
    const char* tile = g.tiles + static_cast<int64_t>(id / kTile) * g.tile_bytes;
    const float* query = g.queries + static_cast<int64_t>(row) * g.width;
    double sum = 0;
    const auto add = [&](int at, double value) {
        if (at < g.width) sum += query_value(g, query, at) * value;
    };
    if constexpr (Int8) {
        const uint32_t* values = reinterpret_cast<const uint32_t*>(tile) + id % kTile;
#pragma unroll 4
        for (int at = lane; at < g.stored_width / 4; at += 32) {
            const uint32_t v = __ldcs(values + static_cast<int64_t>(at) * kTile);
#pragma unroll
            for (int j = 0; j < 4; ++j) add(at * 4 + j, static_cast<double>(static_cast<int>(v >> 8 * j & 255) - 128));
        }
    } else {
        const uint4* values = reinterpret_cast<const uint4*>(tile) + id % kTile * (g.stored_width / 8);
#pragma unroll 1
        for (int at = lane; at < g.stored_width / 8; at += 32) {
            const uint4 v = __ldcs(values + at);
            const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float2 x = of_bf16(pairs[j]);
                add(at * 8 + j * 2, x.x), add(at * 8 + j * 2 + 1, x.y);
            }
        }
    }
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(kAll, sum, apart);
    if (lane != 0) return;
    const float score = static_cast<float>(Int8 && g.scale ? sum * g.scale[id] : sum);
    s.exact[place] = entry_of(score, id);
    if (score != score) atomicOr(s.status + row, kCurNan);
}

// One block for each query: sorts its best, and checks whether another item could be among them.
__global__ void __launch_bounds__(kSortThreads) finish_kernel(CurTopk g, Scratch s, int64_t* ids, float* scores) {
    extern __shared__ Entry shared[];
    const int row = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
    const int64_t begin = static_cast<int64_t>(row) * g.wanted;
    for (int i = thread; i < g.wanted; i += kSortThreads) shared[i] = s.exact[begin + i];
    cut_back(shared, power_of_two(g.wanted), g.wanted, thread, kSortThreads, BlockBarrier());
    for (int i = thread; i < g.k; i += kSortThreads) {
        const bool there = shared[i] != kNoEntry;
        ids[static_cast<int64_t>(row) * g.k + i] = there ? id_of(shared[i]) : -1;
        scores[static_cast<int64_t>(row) * g.k + i] = there ? score_of(shared[i]) : -INFINITY;
    }
    if (thread != 0 || g.count <= g.wanted) return;  // no item was left out
    const Entry last = s.found[begin + g.wanted - 1];
    // Every other item's score is at most that of the last product plus the error. The last addition covers the
    // rounding to float32.
    const State& state = s.states[row];
    double least = score_of(last) * state.unit + state.error;
    least += fabs(least) * ldexp(1.0, -22) + ldexp(1.0, -146);
    // Compared in float32, where a score that overflows is not above others that overflow.
    if (!(score_of(shared[g.k - 1]) > static_cast<float>(least))) s.status[row] |= kCurUncertain;
}

size_t words_at_host(const CurTopk& g) {
    return (static_cast<size_t>(g.int8 ? g.stored_width / 4 : g.stored_width) + kPadding - 1) / kPadding * kPadding;
}
size_t scan_shared(const CurTopk& g, int queries) {
    return queries * (reservoir_size(g.wanted, kBatch) * sizeof(Entry) + words_at_host(g) * sizeof(uint32_t));
}

// Shared memory of a scan for many queries: the queries, and a reservoir that is being cut back.
size_t many_shared(const CurTopk& g) {
    return kMany * words_at_host(g) * sizeof(uint32_t) + reservoir_size(g.wanted, kManyBatch) * sizeof(Entry);
}

// How a call is cut: `blocks` with work, `queries` of one scan, `rows` of one launch. parts: parts of the sample of a
// scan for many queries, else 0.
struct Plan {
    int blocks, queries, rows, groups, parts;
};
Plan plan_of(const CurTopk& g) {
    const auto blocks_for = [&](int each, int batch) {
        return static_cast<int>(
            std::min<int64_t>(g.processors * each, std::max<int64_t>((g.count + batch - 1) / batch, 1)));
    };
    // More parts than wanted entries, so that the sample's bound is not the worst of its parts.
    const int parts = power_of_two(g.wanted + g.wanted / 2), blocks = blocks_for(2, kManyBatch);
    const size_t reservoirs = sizeof(Entry) * blocks * kMany * reservoir_size(g.wanted, kManyBatch);
    if (g.int8 && g.rows > kTogether && g.count >= int64_t{4} * parts * kPart && many_shared(g) <= kRoom &&
        reservoirs <= kReservoirs)
        return {blocks, kMany, std::min(kMany, g.rows), 0, parts};
    Plan plan{1, 1, 1, 0, 0};
    if (g.int8 && g.rows > 1 && scan_shared(g, kTogether) <= kRoom) plan.queries = kTogether;
    plan.blocks = blocks_for(blocks_of(plan.queries), kBatch);
    const int64_t rows = kLists / (sizeof(Entry) * plan.blocks * g.wanted) / plan.queries * plan.queries;
    plan.rows = static_cast<int>(std::min<int64_t>(std::max<int64_t>(rows, plan.queries), g.rows));
    for (int groups = 1; groups <= kWarps && !plan.groups; groups *= 2)
        if (plan.blocks * groups >= g.wanted) plan.groups = groups;
    return plan;
}

size_t rounded_up(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Fills in the addresses of the scratch that begins at `p`; returns its bytes.
size_t lay_out(const CurTopk& g, char* p, Scratch* s) {
    const Plan plan = plan_of(g);
    size_t at = 0;
    const auto take = [&](size_t bytes) {
        char* part = p + at;
        at += rounded_up(bytes);
        return part;
    };
    const size_t rows = g.rows, wanted = g.wanted * sizeof(Entry);
    s->status = reinterpret_cast<int32_t*>(take(rows * sizeof(int32_t)));
    s->states = reinterpret_cast<State*>(take(rows * sizeof(State)));
    s->rounded = reinterpret_cast<uint32_t*>(take(rows * words_at_host(g) * sizeof(uint32_t)));
    s->lists = reinterpret_cast<Entry*>(take(static_cast<size_t>(plan.rows) * plan.blocks * wanted));
    s->found = reinterpret_cast<Entry*>(take(rows * wanted));
    s->exact = reinterpret_cast<Entry*>(take(rows * wanted));
    const size_t kept = plan.parts ? sizeof(Entry) * plan.blocks * kMany * reservoir_size(g.wanted, kManyBatch) : 0;
    s->tops = reinterpret_cast<Entry*>(take(sizeof(Entry) * kMany * plan.parts));
    s->reservoirs = reinterpret_cast<Entry*>(take(kept));
    return at;
}

// Scans for rounded queries and writes their bests to s.found.
cudaError_t scan_for_few(const CurTopk& g, const Scratch& s, const Plan& plan, cudaStream_t stream) {
    const size_t shared = scan_shared(g, plan.queries);
    const auto scan = !g.int8             ? scan_kernel<false, 1>
                      : plan.queries == 1 ? scan_kernel<true, 1>
                                          : scan_kernel<true, kTogether>;
    const size_t merge_shared = reservoir_size(g.wanted, kSortThreads) * sizeof(Entry);
    for (int begin = 0; begin < g.rows; begin += plan.rows) {
        const int rows = std::min(plan.rows, g.rows - begin);
        const int scans = (rows + plan.queries - 1) / plan.queries;
        cudaError_t error =
            cudaFuncSetAttribute(scan, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (error != cudaSuccess) return error;
        scan<<<scans * plan.blocks, kThreads, shared, stream>>>(g, s, begin, rows, plan.blocks, plan.groups);
        error = cudaGetLastError();
        if (error != cudaSuccess) return error;
        merge_kernel<<<rows, kSortThreads, merge_shared, stream>>>(g, s, begin, plan.blocks);
        error = cudaGetLastError();
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

cudaError_t scan_for_many(const CurTopk& g, const Scratch& s, const Plan& plan, cudaStream_t stream) {
    const int words = static_cast<int>(kMany * words_at_host(g) * sizeof(uint32_t)), room = plan.blocks * g.wanted;
    const int shared = static_cast<int>(many_shared(g));
    const size_t chosen = reservoir_size(g.wanted, kSortThreads) * sizeof(Entry);
    for (int begin = 0; begin < g.rows; begin += kMany) {
        const int rows = std::min(kMany, g.rows - begin);
        cudaError_t error = cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, words);
        if (error != cudaSuccess) return error;
        sample_kernel<<<plan.parts, kThreads, words, stream>>>(g, s, begin);
        error = cudaGetLastError();
        if (error != cudaSuccess) return error;
        choose_kernel<<<rows, kSortThreads, chosen, stream>>>(g, s, begin, s.tops, plan.parts, false);
        error = cudaGetLastError();
        if (error != cudaSuccess) return error;
        error = cudaFuncSetAttribute(many_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        if (error != cudaSuccess) return error;
        many_kernel<<<plan.blocks, kThreads, shared, stream>>>(g, s, begin);
        error = cudaGetLastError();
        if (error != cudaSuccess) return error;
        choose_kernel<<<rows, kSortThreads, chosen, stream>>>(g, s, begin, s.lists, room, true);
        error = cudaGetLastError();
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

}  // namespace

size_t cur_scratch(const CurTopk& g) {
    Scratch s;
    return lay_out(g, nullptr, &s);
}

cudaError_t cur_topk(const CurTopk& g, void* scratch, int64_t* ids, float* scores, cudaStream_t stream) {
    Scratch s;
    lay_out(g, static_cast<char*>(scratch), &s);
    const Plan plan = plan_of(g);
    prepare_kernel<<<g.rows, kThreads, 0, stream>>>(g, s);
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;

    error = plan.parts ? scan_for_many(g, s, plan, stream) : scan_for_few(g, s, plan, stream);
    if (error != cudaSuccess) return error;
    const auto rescore = g.int8 ? rescore_kernel<true> : rescore_kernel<false>;
    rescore<<<g.rows*((g.wanted + kWarps - 1) / kWarps), kThreads, 0, stream>>>(g, s);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    const size_t finish_shared = power_of_two(g.wanted) * sizeof(Entry);
    finish_kernel<<<g.rows, kSortThreads, finish_shared, stream>>>(g, s, ids, scores);
    return cudaGetLastError();
}

}  // namespace fastrerank::cuda
