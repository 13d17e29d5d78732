#include "runtime/bytes.h"

#include <cstdlib>
#include <new>
#include <utility>

namespace fastrerank::cpu {

Bytes::Bytes(size_t n, size_t alignment) : p_(nullptr), n_(n) {
    if (!n) return;
    const size_t rounded = (n + 64 + alignment - 1) / alignment * alignment;
    p_ = static_cast<char*>(std::aligned_alloc(alignment, rounded));
    if (!p_) throw std::bad_alloc();
}
Bytes::~Bytes() { std::free(p_); }
Bytes::Bytes(Bytes&& other) noexcept : p_(std::exchange(other.p_, nullptr)), n_(std::exchange(other.n_, 0)) {}
Bytes& Bytes::operator=(Bytes&& other) noexcept {
    std::swap(p_, other.p_);
    std::swap(n_, other.n_);
    return *this;
}

char* thread_scratch(size_t n) {
    thread_local Bytes scratch;
    if (scratch.size() < n) {
        scratch = Bytes();  // release before asking for more
        scratch = Bytes(n);
    }
    return scratch.get();
}

}  // namespace fastrerank::cpu
