// Which instruction sets this processor has, and their kernel tables.
#include "engine.h"
#include "kernels.h"

namespace patchsparse {
namespace {

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

}  // namespace patchsparse

int32_t ps_abi() { return 1; }

int32_t ps_isa_supported(int32_t isa) {
    if (isa < PS_PORTABLE || isa > PS_AVX512) return 0;
    return patchsparse::kernels<float>(isa) != nullptr;
}
