// `run FILE`: the searches that FILE describes, each with several seeds; what they find to standard output. Included
// behind csrc/cur_topk/cur_topk.cu, whose scratch it shows too.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace {

using namespace fastrerank::cuda;

// As many bytes as there are, so that whatever lies beyond is out of bounds; aligned as cudaMalloc's are.
struct Memory {
    size_t bytes;
    char* p = nullptr;
    explicit Memory(size_t n) : bytes(n) {
        if (posix_memalign(reinterpret_cast<void**>(&p), 256, n)) std::abort();
    }
    Memory(size_t n, std::FILE* file) : Memory(n) {
        if (std::fread(p, 1, n, file) != n) std::abort();
    }
    Memory(const Memory&) = delete;
    ~Memory() { std::free(p); }
    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(p);
    }
};

template <class T>
void show(const T* values, size_t n) {
    std::fwrite(values, sizeof(T), n, stdout);
}

}  // namespace

int main(int, char** given) {
    std::FILE* file = std::fopen(given[1], "rb");
    if (!file) return 2;
    // int8, bytes of all tiles, of one, items, scales of items, of anchors, width, stored width, queries, k, wanted,
    // processors, seeds
    int64_t n[13];
    double reach;
    while (std::fread(n, sizeof n, 1, file) == 1 && std::fread(&reach, sizeof reach, 1, file) == 1) {
        const Memory tiles(n[1], file), scale(n[4] ? n[3] * 4 : 0, file), anchor(n[5] ? n[6] * 4 : 0, file);
        const Memory queries(n[8] * n[6] * 4, file);
        CurTopk g{};
        g.int8 = n[0] != 0, g.tiles = tiles.p, g.tile_bytes = n[2], g.count = n[3];
        g.scale = n[4] ? scale.as<float>() : nullptr, g.anchor = n[5] ? anchor.as<float>() : nullptr;
        g.width = static_cast<int>(n[6]), g.stored_width = static_cast<int>(n[7]), g.reach = reach;
        g.queries = queries.as<float>(), g.rows = static_cast<int>(n[8]);
        g.k = static_cast<int>(n[9]), g.wanted = static_cast<int>(n[10]), g.processors = static_cast<int>(n[11]);
        for (int seed = 0; seed < n[12]; ++seed) {
            emulated::seed(seed);
            const Memory scratch(cur_scratch(g)), ids(n[8] * n[9] * 8), scores(n[8] * n[9] * 4);
            for (const Memory* one : {&scratch, &ids, &scores}) std::memset(one->p, 0xa5, one->bytes);
            if (cur_topk(g, scratch.p, ids.as<int64_t>(), scores.as<float>(), nullptr) != cudaSuccess) return 3;
            Scratch s;
            lay_out(g, scratch.p, &s);
            show(s.status, n[8]), show(ids.as<int64_t>(), n[8] * n[9]), show(scores.as<float>(), n[8] * n[9]);
            show(s.states, n[8]), show(s.rounded, n[8] * words_of(g)), show(s.found, n[8] * n[10]);
            show(std::vector<int>(n[8], plan_of(g).parts).data(), n[8]);
        }
    }
    std::fclose(file);
}
