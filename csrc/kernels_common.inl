// Fill the kernel table of one instruction set. The file that includes this has included kernels.h and a simd_*.h;
// all is in an anonymous namespace, so that no instance compiled with special flags is shared with another file.

namespace patchsparse {
namespace {

template <int N>
struct Int {
    static constexpr int value = N;
};

#include "gemm.inl"
#include "pack.inl"
#include "squares.inl"
#include "stencil.inl"
#include "winograd.inl"

template <class V, int ROWS, int OUTER, bool DEPTHWISE_PATCHES>
constexpr Kernels<typename V::T> table() {
    static_assert(OUTER <= V::width, "a tile of gathered rows is one vector");
    using T = typename V::T;
    Kernels<T> t{ROWS, OUTER, LANES * V::width, any_tile<V, ROWS>, pack<V>, gather<V, LANES>, gather<V, 1>, any_outer<V, OUTER>, nullptr,
                 nullptr, depthwise_squares<V, T>, depthwise_squares_wgrad<V, T>, depthwise_pixel<V>, depthwise_pixel_wgrad<V>,
                 pool_max<T>, pool_add<T>,
                 {{winograd_source<V, T>, winograd_target<V, T>, winograd_gradient<V, T>},
                  {winograd_source<V, uint16_t>, winograd_target<V, uint16_t>, winograd_gradient<V, uint16_t>},
                  winograd_weight<V>, winograd_wgrad<V>}};
    if constexpr (DEPTHWISE_PATCHES) {
        t.depthwise_patch = depthwise_patch<V>;
        t.depthwise_patch_wgrad = depthwise_patch_wgrad<V>;
    }
    return t;
}

}  // namespace
}  // namespace patchsparse
