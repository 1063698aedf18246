// Inner loops for any processor, built with the flags that every file gets; float64 has no others.
#include "kernels/simd_generic.h"
#include "kernels/tables.h"
#include "kernels/tables.inl"

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
