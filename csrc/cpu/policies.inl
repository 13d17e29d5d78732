// Policies that need only vector words: float32, and bfloat16 weights widened on load for levels without a bfloat16
// dot product (inputs stay float32 there).
template <int Rows, int Vectors>
struct FloatPolicy {
    using Acc = vf;
    using A = vf;
    using B = vf;
    static constexpr int kStep = 1, kInputs = 4, kABytes = 4, kBBytes = VL * 4, kElement = 4, kRows = Rows,
                         kVectors = Vectors;
    INLINE A load_a(const char* p) { return splat(*reinterpret_cast<const float*>(p)); }
    INLINE B load_b(const char* p) { return load(reinterpret_cast<const float*>(p)); }
    INLINE void dot(Acc& c, A a, B b) { c += a * b; }
    INLINE void store_input(void* p, int at, vf v) { store(static_cast<float*>(p) + at, v); }
};

template <int Rows, int Vectors>
struct WideningBf16Policy : FloatPolicy<Rows, Vectors> {
    static constexpr int kBBytes = VL * 2;
    INLINE vf load_b(const char* p) { return widen_bf16(reinterpret_cast<const uint16_t*>(p)); }
};
