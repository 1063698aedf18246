// Fill the kernel table of one instruction set. A file includes this after tables.h and a simd_*.h. All is in an
// anonymous namespace, so that nothing compiled with special flags is shared with another file.
#include "kernels/bf16.h"

namespace patchsparse {
namespace {

template <int N>
struct Int {
    static constexpr int value = N;
};

#include "kernels/gemm.inl"
#include "kernels/pack.inl"
#include "kernels/squares.inl"
#include "kernels/stencil.inl"
#include "kernels/winograd.inl"

template <class V, class S>
constexpr StoredKernels<typename V::T> stored() {
    return {pack<V, S>, winograd_source<V, S>, winograd_target<V, S>, winograd_gradient<V, S>, winograd_wgrad<V, S>};
}

template <class V, int ROWS, int OUTER, bool DEPTHWISE_PATCHES>
constexpr Kernels<typename V::T> table() {
    static_assert(OUTER <= V::width, "a tile of gathered rows is one vector");
    using T = typename V::T;
    Kernels<T> t{ROWS, OUTER, LANES * V::width, stored<V, T>(), stored<V, Bf16>(), any_tile<V, ROWS>, gather<V, LANES>, gather<V, 1>,
                 any_outer<V, OUTER>, narrow<V>, winograd_weight<V>, nullptr, nullptr, depthwise_squares<V, T>, depthwise_squares_wgrad<V, T>,
                 depthwise_pixel<V>, depthwise_pixel_wgrad<V>, pool_max<T>, pool_add<T>};
    if constexpr (DEPTHWISE_PATCHES) {
        t.depthwise_patch = depthwise_patch<V>;
        t.depthwise_patch_wgrad = depthwise_patch_wgrad<V>;
    }
    return t;
}

}  // namespace
}  // namespace patchsparse
