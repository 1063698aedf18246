// Inner loops for AVX2: built with its flags (flags.txt), chosen at run time (runtime/dispatch.cpp).
#include "kernels/tables.h"

#ifdef __AVX2__

#include "kernels/simd_avx2.h"
#include "kernels/tables.inl"

namespace patchsparse {

const Kernels<float>* kernels_avx2_f32() {
    static constexpr Kernels<float> kernels = table<Avx2Vector, 6, 6, true>();
    return &kernels;
}

}  // namespace patchsparse

#else  // built for another processor, or by a compiler without these flags

namespace patchsparse {

const Kernels<float>* kernels_avx2_f32() { return nullptr; }

}  // namespace patchsparse

#endif
