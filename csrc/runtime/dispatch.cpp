// Which instruction sets this processor has, and their kernel tables.
#include "runtime/dispatch.h"

#include <algorithm>

#include "engine.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace patchsparse {
namespace {

#if defined(__x86_64__) && defined(__linux__)
constexpr unsigned TILES = 1u << 22 | 1u << 24;  // d of leaf 7.0: matrix tiles, and bfloat16 on them
constexpr unsigned PAIRS = 1u << 5;              // a of leaf 7.1: AVX512_BF16

bool has_pairs() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & PAIRS) != 0;
}

// Matrix tiles also need the permission of the system, because their state is large.
bool has_tiles() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & TILES) != TILES) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#else
bool has_pairs() { return false; }
bool has_tiles() { return false; }
#endif

bool processor_has(int32_t isa) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    if (isa == PS_AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == PS_AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    return isa == PS_PORTABLE;
}

}  // namespace

template <>
const Kernels<float>* kernels<float>(int32_t isa) {
    isa = std::min<int32_t>(isa, PS_AVX512);  // what later ones add is for bfloat16
    if (!processor_has(isa)) return nullptr;
    return isa == PS_AVX512 ? kernels_avx512_f32() : isa == PS_AVX2 ? kernels_avx2_f32() : kernels_portable_f32();
}

// float64 serves gradient checks: one portable table for every processor.
template <>
const Kernels<double>* kernels<double>(int32_t) {
    return kernels_portable_f64();
}

const Bf16Kernels* kernels_bf16(int32_t isa) {
    static const bool pairs = processor_has(PS_AVX512) && has_pairs(), tiles = pairs && has_tiles();
    if (isa == PS_AMX) return tiles ? kernels_amx() : nullptr;
    return isa == PS_AVX512_BF16 && pairs ? kernels_avx512_bf16() : nullptr;
}

bool isa_supported(int32_t isa) {
    if (isa < PS_PORTABLE || isa > PS_AMX) return false;
    if (isa > PS_AVX512 && kernels_bf16(isa) == nullptr) return false;
    return kernels<float>(isa) != nullptr;
}

}  // namespace patchsparse
