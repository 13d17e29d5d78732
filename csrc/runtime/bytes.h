// Aligned memory.
#pragma once
#include <cstddef>

namespace fastrerank::cpu {

// Aligned bytes, followed by 64 bytes of slack so that whole vectors may be read past the end.
class Bytes {
public:
    explicit Bytes(size_t n = 0, size_t alignment = 64);
    ~Bytes();
    Bytes(Bytes&& other) noexcept;
    Bytes& operator=(Bytes&& other) noexcept;
    char* get() const { return p_; }
    size_t size() const { return n_; }
    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(p_);
    }

private:
    char* p_;
    size_t n_;
};

// At least n bytes of this thread, 64-aligned, until its next call. They are not initialised.
char* thread_scratch(size_t n);

}  // namespace fastrerank::cpu
