// Inner loops for avx512; built with its own compiler flags (setup.py), chosen at run time (dispatch.cpp).
#include "kernels.h"

#ifdef __AVX512F__

#include "simd_avx512.h"

#include "kernels_common.inl"

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
