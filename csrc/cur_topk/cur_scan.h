// The kernel of ops.cur_topk's scan: arguments and the candidates that it keeps.
#pragma once
#include "isa/types.h"

namespace fastrerank::cpu {

// Items whose score may be among a query's best, with bounds of their scores. The scan stops soon after count exceeds
// limit.
struct CurReservoir {
    float *upper, *lower;  // (limit + kCurBlock,)
    int32_t* ids;          // likewise
    int count, limit;
    float threshold;  // an item is kept if its upper bound reaches this
};

// A scan of one shard of packed items by several queries; ops/_cur_topk/items.py describes the layout of items. The
// score of item j is s_j * (q . v_j), with an error of at most s_j * (slack * norm_j + spread * residual_j +
// constant); s_j is 1 where there are no scales. Only int8 items have residuals.
constexpr int kCurTile = 16;
constexpr int kCurBlock = 80;  // items that a reservoir takes beyond its limit: four tiles and a partial vector
struct CurScan {
    Precision storage;
    const char* tiles;
    int64_t tile_bytes, count;
    int64_t apart;        // from a tile to the one scanned with it, or 0: a core reads two streams faster than one
    const char* then[2];  // the first pair of tiles of the next scan, prefetched with the last pair of this one
    const float* scale;   // (count,) or null
    int32_t first;        // id of the first item
    int width;            // values of an item as stored, padding included
    int queries;
    const void* q;  // (queries, ldq) int8 or float32, zero in the padding; int8 is padded to whole multiples of 32
    int64_t ldq;    // queries and of 64 values
    const int32_t* start;                    // (queries,) -128 * the sum of q, int8 only
    const float *slack, *spread, *constant;  // (queries,)
    CurReservoir* reservoirs;                // (queries,)
};

}  // namespace fastrerank::cpu
