// Inner loops for AVX-512: built with its flags (flags.txt), chosen at run time (runtime/dispatch.cpp).
#include "kernels/tables.h"

#ifdef __AVX512F__

#include "kernels/simd_avx512.h"
#include "kernels/tables.inl"

namespace patchsparse {

const Kernels<float>* kernels_avx512_f32() {
    static constexpr Kernels<float> kernels = table<Avx512Vector, 12, 14, true>();
    return &kernels;
}

}  // namespace patchsparse

#else  // built for another processor, or by a compiler without these flags

namespace patchsparse {

const Kernels<float>* kernels_avx512_f32() { return nullptr; }

}  // namespace patchsparse

#endif
