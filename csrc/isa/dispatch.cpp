// Detects once which levels this CPU and operating system run.
#include "isa/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastrerank::cpu {
namespace {

#if defined(__x86_64__)
bool bit(unsigned reg, int i) { return reg >> i & 1; }

// Linux grants a process the tiles' 8 KB of state when asked (arch_prctl ARCH_REQ_XCOMP_PERM, component 18); threads
// inherit that.
bool tiles_granted() {
#if defined(__linux__)
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}

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
    const bool saved = (lo & 0x60000) == 0x60000;  // the system saves tiles and their configuration
    if (!saved || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::kAvx512Bf16;
    const bool amx = bit(d, 22) && bit(d, 24) && bit(d, 25);  // AMX_BF16 AMX_TILE AMX_INT8
    return amx && tiles_granted() ? Isa::kAmx : Isa::kAvx512Bf16;
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
        case Isa::kAmx: return amx_kernels();
    }
    return nullptr;
}

}  // namespace fastrerank::cpu
