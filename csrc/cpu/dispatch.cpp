// Which levels this CPU and operating system run, asked once.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastrerank::cpu {
namespace {

#if defined(__x86_64__)
bool bit(unsigned reg, int i) { return reg >> i & 1; }

Isa detect() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27) || !bit(c, 12)) return Isa::kPortable;  // OSXSAVE, FMA
    unsigned lo, hi;
    asm volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    if ((lo & 0x6) != 0x6) return Isa::kPortable;  // the system saves ymm
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !bit(b, 5)) return Isa::kPortable;  // AVX2
    const bool zmm = (lo & 0xe6) == 0xe6;
    const bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && bit(c, 11);  // F DQ BW VL VNNI
    if (!zmm || !avx512) return Isa::kAvx2;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !bit(a, 5)) return Isa::kAvx512;  // AVX512_BF16
    return Isa::kAvx512Bf16;
}
#else
Isa detect() { return Isa::kPortable; }
#endif

}  // namespace

Isa best_isa() {
    static const Isa isa = detect();
    return isa;
}

const Kernels* kernels(Isa isa) {
    if (static_cast<int>(isa) > static_cast<int>(best_isa())) return nullptr;
    switch (isa) {
        case Isa::kPortable: return portable_kernels();
        case Isa::kAvx2: return avx2_kernels();
        case Isa::kAvx512: return avx512_kernels();
        case Isa::kAvx512Bf16: return avx512_bf16_kernels();
    }
    return nullptr;
}

}  // namespace fastrerank::cpu
