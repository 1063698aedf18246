// Inner loops for portable; built with its own compiler flags (setup.py), chosen at run time (dispatch.cpp).
#include "kernels.h"

#include "simd_generic.h"

#include "kernels_common.inl"

namespace patchsparse {

const Kernels<float>* kernels_portable_f32() {
    static constexpr Kernels<float> kernels = table<GenericVector<float>, 4, 4, false>();
    return &kernels;
}

const Kernels<double>* kernels_portable_f64() {
    static constexpr Kernels<double> kernels = table<GenericVector<double>, 4, 2, false>();
    return &kernels;
}

}  // namespace patchsparse
