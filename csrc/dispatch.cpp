// Which instruction sets this processor has, and their kernel tables.
#include "engine.h"
#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace patchsparse {
namespace {

// Matrix tiles need the processor, AVX-512 with bfloat16, and the system's leave to keep their large state.
bool has_matrix_tiles() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, AVX512_BF16 = 1u << 5;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (BF16 | TILE)) != (BF16 | TILE)) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & AVX512_BF16) == 0) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

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
    if (isa == PS_AMX) isa = PS_AVX512;
    if (!processor_has(isa)) return nullptr;
    return isa == PS_AVX512 ? kernels_avx512_f32() : isa == PS_AVX2 ? kernels_avx2_f32() : kernels_portable_f32();
}

// float64 serves gradient checks: one portable table for every processor.
template <>
const Kernels<double>* kernels<double>(int32_t) {
    return kernels_portable_f64();
}

const Bf16Kernels* kernels_bf16() {
    static const bool present = processor_has(PS_AVX512) && has_matrix_tiles();
    return present ? kernels_amx() : nullptr;
}

}  // namespace patchsparse

int32_t ps_abi() { return 2; }

int32_t ps_isa_supported(int32_t isa) {
    if (isa < PS_PORTABLE || isa > PS_AMX) return 0;
    if (isa == PS_AMX && patchsparse::kernels_bf16() == nullptr) return 0;
    return patchsparse::kernels<float>(isa) != nullptr;
}
