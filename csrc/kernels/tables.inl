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
    Kernels<T> t{ROWS, OUTER, LANES * V::width, stored<V, T>(), stored<V, Bf16>()};
    t.tile = any_tile<V, ROWS>;
    t.gather = gather<V, LANES>;
    t.gather_left = gather<V, 1>;
    t.outer = any_outer<V, OUTER>;
    t.narrow = narrow<V>;
    t.winograd_weight = winograd_weight<V>;
    if constexpr (DEPTHWISE_PATCHES) {
        t.depthwise_patch = depthwise_patch<V>;
        t.depthwise_patch_wgrad = depthwise_patch_wgrad<V>;
    }
    t.depthwise_squares = depthwise_squares<V, T>;
    t.depthwise_squares_wgrad = depthwise_squares_wgrad<V, T>;
    t.depthwise_pixel = depthwise_pixel<V>;
    t.depthwise_pixel_wgrad = depthwise_pixel_wgrad<V>;
    t.pool_max = pool_max<T>;
    t.pool_add = pool_add<T>;
    return t;
}

}  // namespace
}  // namespace patchsparse
