// Inner loops for avx2; built with its own compiler flags (setup.py), chosen at run time (dispatch.cpp).
#include "kernels.h"

#ifdef __AVX2__

#include "simd_avx2.h"

#include "kernels_common.inl"

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
