// `run FILE`: the calls of cur_topk that FILE describes, each with several seeds; ids, scores and status to standard
// output.
#include <cstdio>
#include <memory>

#include "cuda/kernels.h"

using namespace fastrerank::cuda;

namespace {

// As many bytes as there are, so that whatever lies beyond is out of bounds; aligned as cudaMalloc's are.
std::unique_ptr<char[]> read(std::FILE* file, int64_t bytes) {
    std::unique_ptr<char[]> memory(new char[bytes]);
    if (static_cast<int64_t>(std::fread(memory.get(), 1, bytes, file)) != bytes) std::abort();
    return memory;
}

}  // namespace

int main(int, char** given) {
    std::FILE* file = std::fopen(given[1], "rb");
    if (!file) return 2;
    // int8, bytes of all tiles, of one, items, whether there are scales of items, of anchors, first id, width, stored
    // width, queries, k, wanted, blocks, seeds
    int64_t n[14];
    while (std::fread(n, sizeof n, 1, file) == 1) {
        double reach;
        if (std::fread(&reach, sizeof reach, 1, file) != 1) return 4;
        const auto tiles = read(file, n[1]), scale = read(file, n[4] ? n[3] * 4 : 0);
        const auto anchors = read(file, n[5] ? n[7] * 4 : 0), queries = read(file, n[9] * n[7] * 4);
        CurTopk g{};
        g.int8 = n[0] != 0, g.tiles = tiles.get(), g.tile_bytes = n[2], g.count = n[3];
        g.scale = n[4] ? reinterpret_cast<float*>(scale.get()) : nullptr;
        g.anchors = n[5] ? reinterpret_cast<float*>(anchors.get()) : nullptr;
        g.first = static_cast<int32_t>(n[6]), g.width = static_cast<int>(n[7]);
        g.stored_width = static_cast<int>(n[8]), g.reach = reach;
        g.queries = reinterpret_cast<float*>(queries.get()), g.rows = static_cast<int>(n[9]);
        g.k = static_cast<int>(n[10]), g.wanted = static_cast<int>(n[11]), g.blocks = static_cast<int>(n[12]);
        for (int seed = 0; seed < n[13]; ++seed) {
            emulated::seed(seed);
            const std::unique_ptr<char[]> scratch(new char[cur_topk_scratch(g)]);
            const std::unique_ptr<int64_t[]> ids(new int64_t[g.rows * g.k]);
            const std::unique_ptr<float[]> scores(new float[g.rows * g.k]);
            const std::unique_ptr<int32_t[]> status(new int32_t[g.rows]);
            g.scratch = scratch.get(), g.ids = ids.get(), g.scores = scores.get(), g.status = status.get();
            if (cur_topk(g, nullptr) != cudaSuccess) return 3;
            std::fwrite(ids.get(), 8, g.rows * g.k, stdout), std::fwrite(scores.get(), 4, g.rows * g.k, stdout);
            std::fwrite(status.get(), 4, g.rows, stdout);
        }
    }
    std::fclose(file);
}
