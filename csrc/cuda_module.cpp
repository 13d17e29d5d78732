// The pybind11 door to the CUDA kernels: checks arguments, releases the GIL, calls. No arithmetic. Importing it needs
// no driver: the runtime is linked statically and loads the driver with the first call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernels.h"

namespace py = pybind11;
using namespace fastrerank::cuda;

namespace {

void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // said here, and not to be found again after the next launch
    throw std::runtime_error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(error));
}

// Device memory, events and the current device, given back on every path.
struct Memory {
    void* p = nullptr;
    explicit Memory(size_t bytes) { check(cudaMalloc(&p, bytes), "allocating device memory"); }
    ~Memory() { cudaFree(p); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    uint32_t* words() const { return static_cast<uint32_t*>(p); }
};
struct Event {
    cudaEvent_t e = nullptr;
    Event() { check(cudaEventCreate(&e), "creating an event"); }
    ~Event() { cudaEventDestroy(e); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
};
struct OnDevice {
    int before = 0;
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before), "asking for the current device");
        check(cudaSetDevice(device), "choosing the device");
    }
    ~OnDevice() { cudaSetDevice(before); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;
};

std::string status() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    cudaGetLastError();
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

py::list devices() {
    py::list result;
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        cudaGetLastError();
        return result;
    }
    for (int i = 0; i < count; ++i) {
        const OnDevice on(i);
        cudaDeviceProp p;
        check(cudaGetDeviceProperties(&p, i), "reading a device's properties");
        py::dict d;
        d["name"] = std::string(p.name);
        d["capability"] = std::to_string(p.major) + "." + std::to_string(p.minor);
        d["memory"] = p.totalGlobalMem;
        d["multiprocessors"] = p.multiProcessorCount;
        d["supported"] = has_code();
        result.append(d);
    }
    return result;
}

double bandwidth(int device, int64_t bytes, int rounds) {
    if (bytes < (1 << 20) || bytes % 16) throw std::invalid_argument("bytes must be a multiple of 16, at least 1 MiB");
    if (rounds < 1) throw std::invalid_argument("rounds must be at least 1");
    const py::gil_scoped_release release;
    const OnDevice on(device);
    const int64_t n = bytes / 4;
    const Memory words(bytes), sums(kReadBlocks * sizeof(uint32_t));
    check(fill(words.words(), n, nullptr), "launching fill");
    const Event begin, end;
    float best = 0;
    for (int i = 0; i <= rounds; ++i) {  // the first is a warm-up
        check(cudaEventRecord(begin.e, nullptr), "recording an event");
        check(read(words.words(), n, sums.words(), nullptr), "launching read");
        check(cudaEventRecord(end.e, nullptr), "recording an event");
        check(cudaEventSynchronize(end.e), "read");
        float ms = 0;
        check(cudaEventElapsedTime(&ms, begin.e, end.e), "timing");
        if (i > 0 && (best == 0 || ms < best)) best = ms;
    }
    std::vector<uint32_t> host(kReadBlocks);
    check(cudaMemcpy(host.data(), sums.p, host.size() * sizeof(uint32_t), cudaMemcpyDeviceToHost), "copying sums");
    uint32_t sum = 0;
    for (const uint32_t s : host) sum += s;
    const uint64_t half = n % 2 ? static_cast<uint64_t>(n) * ((n - 1) / 2) : static_cast<uint64_t>(n / 2) * (n - 1);
    if (sum != static_cast<uint32_t>(half)) throw std::runtime_error("CUDA: read returned a wrong sum");
    return static_cast<double>(bytes) / (best * 1e-3);
}

int64_t scratch_of_cur_topk(bool int8, int stored_width, int rows, int wanted, int blocks) {
    CurTopk g{};
    g.int8 = int8, g.stored_width = stored_width, g.rows = rows, g.wanted = wanted, g.blocks = blocks;
    return cur_topk_scratch(g);
}

// Asynchronous on `stream` of the current device; device pointers as integers (scale, anchors: 0 for none).
void launch_cur_topk(bool int8, uintptr_t tiles, int64_t tile_bytes, int64_t count, uintptr_t scale, uintptr_t anchors,
                     int32_t first, int width, int stored_width, double reach, uintptr_t queries, int rows, int k,
                     int wanted, int blocks, uintptr_t scratch, uintptr_t ids, uintptr_t scores, uintptr_t status,
                     uintptr_t stream) {
    if (wanted < 1 || wanted > kCurMostWanted)
        throw std::invalid_argument("wanted must be 1 .. " + std::to_string(kCurMostWanted));
    if (k < 1 || k > wanted) throw std::invalid_argument("k must be 1 .. wanted, " + std::to_string(wanted));
    if (rows < 1 || blocks < 1 || count < 1) throw std::invalid_argument("rows, blocks and count must be at least 1");
    const CurTopk g{int8,
                    reinterpret_cast<const char*>(tiles),
                    tile_bytes,
                    count,
                    reinterpret_cast<const float*>(scale),
                    reinterpret_cast<const float*>(anchors),
                    first,
                    width,
                    stored_width,
                    reach,
                    reinterpret_cast<const float*>(queries),
                    rows,
                    k,
                    wanted,
                    blocks,
                    reinterpret_cast<char*>(scratch),
                    reinterpret_cast<int64_t*>(ids),
                    reinterpret_cast<float*>(scores),
                    reinterpret_cast<int32_t*>(status)};
    const py::gil_scoped_release release;
    check(cur_topk(g, reinterpret_cast<cudaStream_t>(stream)), "launching cur_topk");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "fastrerank's CUDA kernels; use them through fastrerank.ops.";
    m.attr("architectures") = FASTRERANK_CUDA_ARCHITECTURES;
    m.attr("runtime") = CUDART_VERSION;
    m.def("status", &status, "Why no device can be used; empty where one can.");
    m.def("devices", &devices, "A dict for each device; empty where there is no driver.");
    m.def("cur_topk_scratch", &scratch_of_cur_topk, py::arg("int8"), py::arg("stored_width"), py::arg("rows"),
          py::arg("wanted"), py::arg("blocks"));
    m.def("cur_topk", &launch_cur_topk, py::arg("int8"), py::arg("tiles"), py::arg("tile_bytes"), py::arg("count"),
          py::arg("scale"), py::arg("anchors"), py::arg("first"), py::arg("width"), py::arg("stored_width"),
          py::arg("reach"), py::arg("queries"), py::arg("rows"), py::arg("k"), py::arg("wanted"), py::arg("blocks"),
          py::arg("scratch"), py::arg("ids"), py::arg("scores"), py::arg("status"), py::arg("stream"));
    m.def("bandwidth", &bandwidth, py::arg("device"), py::arg("bytes"), py::arg("rounds"));
}
