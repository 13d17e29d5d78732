// The module `_cuda`: checks arguments, releases the GIL and calls. Importing it needs no driver: the runtime is linked
// statically and loads the driver with the first call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "bandwidth/bandwidth.h"
#include "cur_topk/cuda_topk.h"

namespace py = pybind11;
using namespace fastrerank::cuda;

namespace {

void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // reported here, so that the next launch does not report it again
    throw std::runtime_error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(error));
}

// Device memory, events and the current device, released or restored on every path.
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

size_t cur_scratch_bytes(bool int8, int64_t count, int stored_width, int rows, int k, int wanted, int processors) {
    CurTopk g{};
    g.int8 = int8, g.count = count, g.stored_width = stored_width, g.rows = rows, g.k = k, g.wanted = wanted;
    g.processors = processors;
    return cur_scratch(g);
}

// Asynchronous on `stream` of `device`; device pointers as integers (scale, anchor: 0 for none).
void launch_cur_topk(bool int8, uintptr_t tiles, int64_t tile_bytes, int64_t count, uintptr_t scale, uintptr_t anchor,
                     int width, int stored_width, double reach, uintptr_t queries, int rows, int k, int wanted,
                     int processors, uintptr_t scratch, uintptr_t ids, uintptr_t scores, int device, uintptr_t stream) {
    if (k < 1 || k > wanted || wanted > kCurMostK)
        throw std::invalid_argument("k and wanted must be 1 <= k <= wanted <= " + std::to_string(kCurMostK));
    if (rows < 1 || processors < 1) throw std::invalid_argument("rows and processors must be at least 1");
    const CurTopk g{int8,
                    reinterpret_cast<const char*>(tiles),
                    tile_bytes,
                    count,
                    reinterpret_cast<const float*>(scale),
                    reinterpret_cast<const float*>(anchor),
                    width,
                    stored_width,
                    reach,
                    reinterpret_cast<const float*>(queries),
                    rows,
                    k,
                    wanted,
                    processors};
    const py::gil_scoped_release release;
    // A kernel's limit of shared memory is set before its launch, and no other thread may change it in between.
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> alone(one_at_a_time);
    const OnDevice on(device);
    check(cur_topk(g, reinterpret_cast<void*>(scratch), reinterpret_cast<int64_t*>(ids),
                   reinterpret_cast<float*>(scores), reinterpret_cast<cudaStream_t>(stream)),
          "launching cur_topk");
}

// Waits for launch_cur_topk on `stream`, and returns the first `rows` words of its scratch.
std::vector<int32_t> cur_status(uintptr_t scratch, int rows, int device, uintptr_t given) {
    std::vector<int32_t> status(rows);
    const py::gil_scoped_release release;
    const OnDevice on(device);
    const auto stream = reinterpret_cast<cudaStream_t>(given);
    check(cudaMemcpyAsync(status.data(), reinterpret_cast<const void*>(scratch), rows * sizeof(int32_t),
                          cudaMemcpyDeviceToHost, stream),
          "copying what cur_topk says");
    check(cudaStreamSynchronize(stream), "cur_topk");
    return status;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "fastrerank's CUDA kernels; use them through fastrerank.ops.";
    m.attr("architectures") = FASTRERANK_CUDA_ARCHITECTURES;
    m.attr("runtime") = CUDART_VERSION;
    m.def("status", &status, "Why no device can be used; empty where one can.");
    m.def("devices", &devices, "A dict for each device; empty where there is no driver.");
    m.def("cur_scratch", &cur_scratch_bytes, py::arg("int8"), py::arg("count"), py::arg("stored_width"),
          py::arg("rows"), py::arg("k"), py::arg("wanted"), py::arg("processors"));
    m.def("cur_topk", &launch_cur_topk, py::arg("int8"), py::arg("tiles"), py::arg("tile_bytes"), py::arg("count"),
          py::arg("scale"), py::arg("anchor"), py::arg("width"), py::arg("stored_width"), py::arg("reach"),
          py::arg("queries"), py::arg("rows"), py::arg("k"), py::arg("wanted"), py::arg("processors"),
          py::arg("scratch"), py::arg("ids"), py::arg("scores"), py::arg("device"), py::arg("stream"));
    m.def("cur_status", &cur_status, py::arg("scratch"), py::arg("rows"), py::arg("device"), py::arg("stream"));
    m.def("bandwidth", &bandwidth, py::arg("device"), py::arg("bytes"), py::arg("rounds"));
}
