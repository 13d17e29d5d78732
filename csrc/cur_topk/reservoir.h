// Selection of the k best of a stream of (score, id), for a CUDA block and for a host thread. Items above a threshold
// go into a reservoir, which is cut back to its k best when it is full. The order is by score descending, then by id
// ascending. No two entries are equal, so the result does not depend on the order of appending.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FASTRERANK_BOTH __host__ __device__ __forceinline__
#else
#define FASTRERANK_BOTH inline
#endif

namespace fastrerank::cuda {

// A score and an id as one number; the better entry is the larger number. Scores are not NaN; -0 counts as 0.
using Entry = uint64_t;
constexpr Entry kNoEntry = 0;  // below every entry: -infinity with the largest id maps above it

FASTRERANK_BOTH uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    return u;
#endif
}
FASTRERANK_BOTH Entry entry_of(float score, int32_t id) {
    const uint32_t bits = bits_of(score + 0.0f);  // -0 + 0 is 0
    const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<Entry>(ordered) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}
FASTRERANK_BOTH int32_t id_of(Entry e) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(e)); }
FASTRERANK_BOTH float score_of(Entry e) {
    const uint32_t ordered = static_cast<uint32_t>(e >> 32);
    const uint32_t bits = ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered;
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
#endif
}

// One step of a descending bitonic sort of n entries, a power of two: the pairs of this lane. Steps are (size, stride)
// with size = 2, 4, .. n and stride = size / 2, .. 1, with a barrier between two steps.
FASTRERANK_BOTH void sort_step(Entry* entries, int n, int size, int stride, int lane, int lanes) {
    for (int i = lane; i < n / 2; i += lanes) {
        const int low = 2 * i - (i & (stride - 1)), high = low + stride;
        const bool descending = (low & size) == 0;
        const Entry a = entries[low], b = entries[high];
        if ((a < b) == descending) entries[low] = b, entries[high] = a;
    }
}

// The least power of two that is at least n, and at least 2.
FASTRERANK_BOTH int power_of_two(int n) {
    int power = 2;
    while (power < n) power *= 2;
    return power;
}

// Room for k kept entries and a batch of new ones.
FASTRERANK_BOTH int reservoir_size(int k, int batch) { return power_of_two(k + batch); }

// Sorts n entries, a power of two. The first `count` are filled, the others become kNoEntry. Calls `barrier` between
// steps and after the last one.
template <class Barrier>
FASTRERANK_BOTH void cut_back(Entry* entries, int n, int count, int lane, int lanes, Barrier barrier) {
    for (int i = count + lane; i < n; i += lanes) entries[i] = kNoEntry;
    barrier();
    for (int size = 2; size <= n; size *= 2)
        for (int stride = size / 2; stride > 0; stride /= 2) {
            sort_step(entries, n, size, stride, lane, lanes);
            barrier();
        }
}

// Writes the k best of `lists` descending lists of k entries to reservoir[0 .. k), with kNoEntry after the last. The
// k-th best of the lists' first few entries is a lower bound, and all entries that reach it go into the reservoir.
// Where it has no room for them, lists are read column by column, up to the first column that adds nothing. `lanes` has
// `lane`, `count`, barrier(), add(int*), which returns the number before, and any(bool) over all lanes, which is also a
// barrier. filled and threshold are shared by all lanes and begin as 0 and kNoEntry; size: reservoir_size(k,
// lanes.count).
template <class Lanes>
FASTRERANK_BOTH void merge_lists(const Entry* best, int lists, int k, Entry* reservoir, int size, int* filled,
                                 Entry* threshold, Lanes lanes) {
    const auto barrier = [&] { lanes.barrier(); };
    // A third more than k: the last of exactly k would be the worst of all lists, a bound that too many entries reach.
    const int enough = (4 * k + 3 * lists - 1) / (3 * lists), columns = enough < k ? enough : k;
    const int firsts = lists * columns;
    if (firsts <= size) {
        for (int i = lanes.lane; i < firsts; i += lanes.count)
            reservoir[i] = best[static_cast<int64_t>(i / columns) * k + i % columns];
        cut_back(reservoir, power_of_two(firsts), firsts, lanes.lane, lanes.count, barrier);
        const Entry least = reservoir[k - 1] > 1 ? reservoir[k - 1] : 1;
        lanes.barrier();
        bool room = true;
        for (int list = lanes.lane; list < lists; list += lanes.count) {
            const Entry* own = best + static_cast<int64_t>(list) * k;
            bool more = true;
            for (int begin = 0; begin < k && more; begin += 4) {
                Entry next[4];  // loaded together, to wait for memory once
                for (int j = 0; j < 4; ++j) next[j] = begin + j < k ? own[begin + j] : kNoEntry;
                for (int j = 0; j < 4 && more; ++j) {
                    more = next[j] >= least;
                    if (!more) break;
                    const int place = lanes.add(filled);
                    room = more = place < size;
                    if (room) reservoir[place] = next[j];
                }
            }
            if (!room) break;
        }
        if (!lanes.any(!room)) {
            const int n = *filled;
            return cut_back(reservoir, power_of_two(n > k ? n : k), n, lanes.lane, lanes.count, barrier);
        }
        if (lanes.lane == 0) *filled = 0;
        lanes.barrier();
    }
    bool found = true;
    for (int column = 0; column < k && found; ++column) {
        found = false;
        for (int begin = 0; begin < lists; begin += lanes.count) {
            const int list = begin + lanes.lane;
            const Entry e = list < lists ? best[static_cast<int64_t>(list) * k + column] : kNoEntry;
            const bool passes = e > *threshold;
            if (passes) reservoir[lanes.add(filled)] = e;
            found |= lanes.any(passes);
            const int n = *filled;
            lanes.barrier();
            if (n + lanes.count <= size) continue;
            cut_back(reservoir, size, n, lanes.lane, lanes.count, barrier);
            if (lanes.lane == 0) *filled = n < k ? n : k, *threshold = n < k ? kNoEntry : reservoir[k - 1];
            lanes.barrier();
        }
    }
    cut_back(reservoir, size, *filled, lanes.lane, lanes.count, barrier);
}

}  // namespace fastrerank::cuda
