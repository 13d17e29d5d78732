// `run FILE`: the scans that FILE describes, each with several seeds; their ids and scores to standard output.
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
    // int8, bytes of all tiles, of one, items, whether there are scales, first id, width, k, blocks, seeds
    int64_t n[10];
    while (std::fread(n, sizeof n, 1, file) == 1) {
        const auto tiles = read(file, n[1]), scale = read(file, n[4] ? n[3] * 4 : 0);
        const auto query = read(file, n[6] * (n[0] ? 1 : 4));
        const CurScan g{n[0] != 0,
                        tiles.get(),
                        n[2],
                        n[3],
                        n[4] ? reinterpret_cast<float*>(scale.get()) : nullptr,
                        static_cast<int32_t>(n[5]),
                        static_cast<int>(n[6]),
                        query.get(),
                        static_cast<int>(n[7])};
        for (int seed = 0; seed < n[9]; ++seed) {
            emulated::seed(seed);
            const std::unique_ptr<uint64_t[]> best(new uint64_t[n[8] * n[7]]);
            const std::unique_ptr<int32_t[]> ids(new int32_t[n[7]]);
            const std::unique_ptr<float[]> scores(new float[n[7]]);
            if (cur_scan(g, best.get(), static_cast<int>(n[8]), ids.get(), scores.get(), nullptr) != cudaSuccess)
                return 3;
            std::fwrite(ids.get(), 4, n[7], stdout), std::fwrite(scores.get(), 4, n[7], stdout);
        }
    }
    std::fclose(file);
}
