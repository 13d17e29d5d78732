// Exact top-k of queries with packed items, on int8 and bfloat16 tiles (ops/_cur.py), three kernels: `prepare` rounds
// the queries and bounds what rounding may hide; `scan` streams the tiles with 16-byte loads, each block its share, and
// keeps a reservoir of the best products in shared memory; `finish` merges the blocks' bests, scores them in float64,
// sorts them and says whether they are surely the best. Every sum has one order and the order of entries is total, so
// results do not depend on timing.
#include "kernels.h"
#include "reservoir.h"

namespace fastrerank::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kFinishThreads = 512;
constexpr int kTile = 16;

// What the kernels of one query hand on, in scratch. `least` and `said` belong to the scan's threshold, see there.
struct alignas(16) Row {
    double unit, error;  // a score is within `error` of `unit` times its product
    unsigned long long least;
    int said;
};

struct BlockBarrier {
    __device__ __forceinline__ void operator()() const { __syncthreads(); }
};

__device__ __forceinline__ double larger(double a, double b) { return a > b ? a : b; }
__device__ __forceinline__ double plus(double a, double b) { return a + b; }

// `join` over the block's threads, the same for all of them.
template <class Join>
__device__ double over_block(double own, double* shared, Join join) {
    __syncthreads();
    shared[threadIdx.x] = own;
    for (int step = kThreads / 2; step > 0; step /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < step)
            shared[threadIdx.x] = join(shared[threadIdx.x], shared[threadIdx.x + step]);
    }
    __syncthreads();
    return shared[0];
}

__device__ __forceinline__ double exact_value(const CurTopk& g, const float* query, int i) {
    return static_cast<double>(query[i]) * (g.anchors ? static_cast<double>(g.anchors[i]) : 1.0);
}

// A block per query. int8: unit = largest / 127, |q . v - unit * q8 . v| <= |q - unit * q8| |v|, and float32 products
// of sums and scales. bfloat16: |q| is brought near 1 by a power of two, so that nothing overflows; float32 sums.
template <bool Int8>
__global__ void __launch_bounds__(kThreads) prepare_kernel(CurTopk g, char* rounded, Row* rows) {
    __shared__ double shared[kThreads];
    const float* query = g.queries + static_cast<int64_t>(blockIdx.x) * g.width;
    double largest = 0, bad = 0;
    for (int i = threadIdx.x; i < g.width; i += kThreads) {
        if (!(fabsf(query[i]) <= 3.402823466e38f)) bad = 1;
        largest = larger(largest, fabs(exact_value(g, query, i)));
    }
    largest = over_block(largest, shared, larger);
    bad = over_block(bad, shared, larger);
    if (largest == 0) largest = 1;
    const double unit = Int8 ? largest / 127 : ldexp(1.0, ilogb(largest)), inverse = 1 / unit;
    double lost = 0, square = 0;
    for (int i = threadIdx.x; i < g.stored_width; i += kThreads) {
        const double inside = i < g.width ? exact_value(g, query, i) * inverse : 0;
        const double value = Int8 ? rint(inside) : inside;
        const int64_t place = static_cast<int64_t>(blockIdx.x) * g.stored_width + i;
        if constexpr (Int8)
            reinterpret_cast<int8_t*>(rounded)[place] = static_cast<int8_t>(bad > 0 ? 0 : value);
        else
            reinterpret_cast<float*>(rounded)[place] = static_cast<float>(bad > 0 ? 0 : value);
        lost += (inside - value) * (inside - value);
        square += value * value;
    }
    lost = over_block(lost, shared, plus);
    square = over_block(square, shared, plus);
    if (threadIdx.x != 0) return;
    constexpr double kHalfUlp = 1.0 / (1 << 24);
    const double error = Int8 ? sqrt(lost) + 8 * kHalfUlp * sqrt(square) : (g.width + 16) * kHalfUlp * sqrt(square);
    const double tiny = g.width * 9.41e-38;  // above width * 2^-123: what is below the smallest normal number
    Row& row = rows[blockIdx.x];
    row.unit = unit, row.error = unit * (error * g.reach + tiny) * 1.0001;
    row.least = ~0ull, row.said = 0;
    g.status[blockIdx.x] = bad > 0 ? kCurQueryNotFinite : kCurExact;
}

// Products of 64 bytes: 16 bytes of a tile's row of groups, four items' four values, with the query's four.
__device__ __forceinline__ void add_int8(const uint4 v, uint32_t q, int (&sum)[4]) {
    // Stored values are value + 128; flipping the top bit makes them signed.
    sum[0] = __dp4a(static_cast<int>(v.x ^ 0x80808080u), static_cast<int>(q), sum[0]);
    sum[1] = __dp4a(static_cast<int>(v.y ^ 0x80808080u), static_cast<int>(q), sum[1]);
    sum[2] = __dp4a(static_cast<int>(v.z ^ 0x80808080u), static_cast<int>(q), sum[2]);
    sum[3] = __dp4a(static_cast<int>(v.w ^ 0x80808080u), static_cast<int>(q), sum[3]);
}

__device__ __forceinline__ float2 of_bf16(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// Products of the items [first, first + kItems), whatever beyond the last. Four neighbouring threads take the 16 items
// of an int8 tile, four items each; a thread takes one bfloat16 item.
template <bool Int8, int kItems>
__device__ __forceinline__ void products_of(const CurTopk& g, const uint32_t* query, int64_t first,
                                            float (&scores)[kItems]) {
    if (first >= g.count) return;
    const char* tile = g.tiles + first / kTile * g.tile_bytes;
    if constexpr (Int8) {
        int sum[4] = {0, 0, 0, 0};
        const uint4* p = reinterpret_cast<const uint4*>(tile) + first % kTile / 4;
        const int words = g.stored_width / 4;
#pragma unroll 8
        for (int i = 0; i < words; ++i) add_int8(__ldcs(p + i * 4), query[i], sum);
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
            const float scale = g.scale && first + j < g.count ? __ldg(g.scale + first + j) : 1.0f;
            scores[j] = static_cast<float>(sum[j]) * scale;
        }
    } else {
        const float* q = reinterpret_cast<const float*>(query);
        const uint4* p = reinterpret_cast<const uint4*>(tile + first % kTile * g.stored_width * 2);
        float even = 0, odd = 0;
#pragma unroll 2
        for (int i = 0; i < g.stored_width / 8; ++i) {
            const uint4 v = __ldcs(p + i);
            const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float2 x = of_bf16(pairs[j]);
                even = fmaf(x.x, q[i * 8 + j * 2], even);
                odd = fmaf(x.y, q[i * 8 + j * 2 + 1], odd);
            }
        }
        scores[0] = even + odd;
    }
}

// The `wanted` best of a block's share, descending, to best[block]. Without a threshold nearly all of a block's first
// items would go through its reservoir, and be sorted there. So a block keeps its first batch aside, and each of
// its `groups` of threads says the best of its part: row->least is the least of what has been said, row->said how many
// have. When all have, and they are `wanted` at least, as many items are at least as good as `least`, and what lies
// below it need not be kept. Nobody waits for that: a block that finds it not yet so goes on with what it has.
template <bool Int8>
__global__ void __launch_bounds__(kThreads, 4)
    scan_kernel(CurTopk g, const char* rounded, Row* row, int groups, Entry* best) {
    extern __shared__ Entry shared[];
    __shared__ int count;
    __shared__ Entry threshold;
    __shared__ Entry tops[kThreads];
    constexpr int kItems = Int8 ? 4 : 1;
    __shared__ float held[kThreads][kItems];  // of each thread; registers are scarce
    constexpr int kBatch = kThreads * kItems;
    const int lane = static_cast<int>(threadIdx.x);
    const int size = reservoir_size(g.wanted, kBatch);
    uint32_t* query = reinterpret_cast<uint32_t*>(shared + size);
    const int words = Int8 ? g.stored_width / 4 : g.stored_width;
    for (int i = lane; i < words; i += kThreads) query[i] = reinterpret_cast<const uint32_t*>(rounded)[i];
    if (lane == 0) count = 0, threshold = kNoEntry;
    __syncthreads();

    float products[kItems];
    const int said_by_all = groups * static_cast<int>(gridDim.x);
    bool settled = groups == 0, holds = false;  // settled: of thread 0
    const auto first_of = [&](int64_t batch) { return batch * kBatch + static_cast<int64_t>(lane) * kItems; };
    const auto entry = [&](const float (&some)[kItems], int64_t first, int j) {
        return first + j < g.count ? entry_of(some[j], g.first + static_cast<int32_t>(first + j)) : kNoEntry;
    };
    const auto append = [&](const float (&some)[kItems], int64_t batch) {
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
            const Entry e = entry(some, first_of(batch), j);
            if (e > threshold) shared[atomicAdd(&count, 1)] = e;
        }
    };
    // Makes room for a batch. A barrier for all.
    const auto make_room = [&] {
        __syncthreads();
        const int filled = count;
        if (lane == 0 && !settled && *static_cast<const volatile int*>(&row->said) == said_by_all) {
            __threadfence();
            const Entry least = *static_cast<const volatile unsigned long long*>(&row->least);
            if (least > threshold + 1) threshold = least - 1;
            settled = true;
        }
        __syncthreads();
        if (filled + kBatch <= size) return;
        cut_back(shared, size, filled, lane, kThreads, BlockBarrier());
        if (lane == 0) {
            count = min(filled, g.wanted);
            if (filled >= g.wanted && shared[g.wanted - 1] > threshold) threshold = shared[g.wanted - 1];
        }
        __syncthreads();
    };

    const int64_t batches = (g.count + kBatch - 1) / kBatch;
    for (int64_t batch = blockIdx.x; batch < batches; batch += gridDim.x) {
        products_of<Int8, kItems>(g, query, first_of(batch), products);
        if (groups > 0 && !holds) {
            holds = true;
            Entry top = kNoEntry;
#pragma unroll
            for (int j = 0; j < kItems; ++j) {
                held[lane][j] = products[j];
                const Entry e = entry(products, first_of(batch), j);
                top = top > e ? top : e;
            }
            tops[lane] = top;
            const int part = kThreads / groups;
            for (int step = part / 2; step > 0; step /= 2) {
                __syncthreads();
                if (lane % part < step && tops[lane + step] > tops[lane]) tops[lane] = tops[lane + step];
            }
            if (lane % part == 0) {
                atomicMin(&row->least, static_cast<unsigned long long>(tops[lane]));
                __threadfence();
                atomicAdd(&row->said, 1);
            }
            continue;
        }
        append(products, batch);
        make_room();
    }
    make_room();
    if (holds) append(held[lane], blockIdx.x);
    __syncthreads();
    // What came before the threshold and lies below it need not be sorted.
    const int filled = count;
    const Entry least = threshold;
    __syncthreads();
    if (lane == 0) count = 0;
    for (int begin = 0; begin < filled; begin += kThreads) {
        const Entry e = begin + lane < filled ? shared[begin + lane] : kNoEntry;
        __syncthreads();  // entries go to places that have been read
        if (e != kNoEntry && e >= least) shared[atomicAdd(&count, 1)] = e;
        __syncthreads();
    }
    __syncthreads();
    const int kept = count;
    __syncthreads();
    cut_back(shared, sorted_size(kept > g.wanted ? kept : g.wanted), kept, lane, kThreads, BlockBarrier());
    for (int i = lane; i < g.wanted; i += kThreads) best[static_cast<int64_t>(blockIdx.x) * g.wanted + i] = shared[i];
}

struct BlockLanes {
    int lane, count;
    __device__ __forceinline__ void barrier() const { __syncthreads(); }
    __device__ __forceinline__ int add(int* n) const { return atomicAdd(n, 1); }
    __device__ __forceinline__ bool any(bool x) const { return __syncthreads_or(x); }
};

// An item's score in float64, rounded once: products of `query` (in float64, scales of anchors multiplied in) with its
// stored values in their order; its scale last.
template <bool Int8>
__device__ float exact_score(const CurTopk& g, const double* query, int64_t item) {
    const char* tile = g.tiles + item / kTile * g.tile_bytes;
    const int slot = static_cast<int>(item % kTile);
    double sum = 0;
    if constexpr (Int8) {
        const int words = g.stored_width / 4;
        const uint32_t* fours = reinterpret_cast<const uint32_t*>(tile) + slot;
#pragma unroll 16
        for (int i = 0; i < words; ++i) {
            const uint32_t four = fours[i * kTile] ^ 0x80808080u;
#pragma unroll
            for (int j = 0; j < 4; ++j) sum += query[i * 4 + j] * static_cast<int8_t>(four >> (8 * j));
        }
        return static_cast<float>(g.scale ? sum * static_cast<double>(g.scale[item]) : sum);
    } else {
        const uint16_t* values = reinterpret_cast<const uint16_t*>(tile) + static_cast<int64_t>(slot) * g.stored_width;
#pragma unroll 16
        for (int i = 0; i < g.width; ++i) sum += query[i] * __uint_as_float(static_cast<uint32_t>(values[i]) << 16);
        return static_cast<float>(sum);
    }
}

// One block: of the blocks' bests the `wanted` best, their scores, the k best of these.
template <bool Int8>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(CurTopk g, int number, const Row* row, const Entry* best, int blocks) {
    extern __shared__ Entry shared[];
    __shared__ int filled, nan;
    __shared__ Entry threshold;
    const int lane = static_cast<int>(threadIdx.x);
    if (lane == 0) filled = 0, nan = 0, threshold = kNoEntry;
    __syncthreads();
    merge_lists(best, blocks, g.wanted, shared, reservoir_size(g.wanted, kFinishThreads), &filled, &threshold,
                BlockLanes{lane, kFinishThreads});
    double* query = reinterpret_cast<double*>(shared + reservoir_size(g.wanted, kFinishThreads));
    for (int i = lane; i < g.stored_width; i += kFinishThreads)
        query[i] = i < g.width ? exact_value(g, g.queries + static_cast<int64_t>(number) * g.width, i) : 0;
    const Entry last = shared[g.wanted - 1];
    __syncthreads();
    for (int i = lane; i < g.wanted; i += kFinishThreads) {
        if (shared[i] == kNoEntry) continue;
        const int32_t id = id_of(shared[i]);
        const float score = exact_score<Int8>(g, query, id - g.first);
        if (score != score) atomicAdd(&nan, 1);
        shared[i] = score != score ? kNoEntry : entry_of(score, id);
    }
    cut_back(shared, sorted_size(g.wanted), g.wanted, lane, kFinishThreads, BlockBarrier());
    for (int i = lane; i < g.k; i += kFinishThreads) {
        const bool there = shared[i] != kNoEntry;
        const int64_t place = static_cast<int64_t>(number) * g.k + i;
        g.ids[place] = there ? id_of(shared[i]) : -1;
        g.scores[place] = there ? score_of(shared[i]) : -INFINITY;
    }
    if (lane != 0 || g.status[number] != kCurExact) return;
    // Every other item's score is at most the last product's and the error; half a step of float32 rounding is covered.
    double most = last == kNoEntry ? -INFINITY : score_of(last) * row->unit + row->error;
    most += last == kNoEntry ? 0 : fabs(most) / (1 << 22) + 1.2e-44;
    const Entry worst = shared[g.k - 1];
    const bool sure = g.count <= g.wanted || (worst != kNoEntry && score_of(worst) > most);
    g.status[number] = nan ? kCurNan : sure ? kCurExact : kCurUncertain;
}

// Where things lie in scratch.
struct Places {
    int64_t rows, rounded, best, end;
    explicit Places(const CurTopk& g) {
        rows = 0;
        rounded = rows + static_cast<int64_t>(sizeof(Row)) * g.rows;
        const int64_t one = static_cast<int64_t>(g.stored_width) * (g.int8 ? 1 : 4);
        best = (rounded + one * g.rows + 15) / 16 * 16;
        end = best + static_cast<int64_t>(sizeof(Entry)) * g.blocks * g.wanted;
    }
};

// Bytes of shared memory that a block of the scan takes: a reservoir and the query.
size_t scan_shared(const CurTopk& g) {
    const int batch = kThreads * (g.int8 ? 4 : 1);
    // Rounded up: the compiler reads a query's last words 16 bytes at a time.
    const size_t query = (static_cast<size_t>(g.stored_width) * (g.int8 ? 1 : 4) + 15) / 16 * 16;
    return reservoir_size(g.wanted, batch) * sizeof(Entry) + query;
}

template <bool Int8>
cudaError_t launch(const CurTopk& g, cudaStream_t stream) {
    constexpr int kBatch = kThreads * (Int8 ? 4 : 1);
    const Places places(g);
    Row* rows = reinterpret_cast<Row*>(g.scratch + places.rows);
    char* rounded = g.scratch + places.rounded;
    Entry* best = reinterpret_cast<Entry*>(g.scratch + places.best);
    const int64_t batches = (g.count + kBatch - 1) / kBatch;
    const int blocks = static_cast<int>(batches < g.blocks ? batches : g.blocks);
    int groups = 1;
    while (groups < 8 && static_cast<int64_t>(groups) * blocks < g.wanted) groups *= 2;
    // Where a block has one batch alone, or groups are too few, nothing is said.
    if (static_cast<int64_t>(groups) * blocks < g.wanted || batches < 2 * static_cast<int64_t>(blocks)) groups = 0;

    const auto prepare = prepare_kernel<Int8>;
    const auto scan = scan_kernel<Int8>;
    const auto finish = finish_kernel<Int8>;
    const size_t shared = scan_shared(g);
    const cudaError_t error =
        cudaFuncSetAttribute(scan, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
    const size_t merged = reservoir_size(g.wanted, kFinishThreads) * sizeof(Entry) + g.stored_width * sizeof(double);
    const cudaError_t more =
        cudaFuncSetAttribute(finish, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(merged));
    if (more != cudaSuccess) return more;
    prepare<<<g.rows, kThreads, 0, stream>>>(g, rounded, rows);
    for (int row = 0; row < g.rows; ++row) {
        const char* query = rounded + static_cast<int64_t>(row) * g.stored_width * (Int8 ? 1 : 4);
        scan<<<blocks, kThreads, shared, stream>>>(g, query, rows + row, groups, best);
        finish<<<1, kFinishThreads, merged, stream>>>(g, row, rows + row, best, blocks);
    }
    return cudaGetLastError();
}

}  // namespace

int64_t cur_topk_scratch(const CurTopk& g) { return Places(g).end; }

cudaError_t cur_topk(const CurTopk& g, cudaStream_t stream) {
    return g.int8 ? launch<true>(g, stream) : launch<false>(g, stream);
}

}  // namespace fastrerank::cuda
