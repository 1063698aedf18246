// Tiles of 2x2 targets, for the patches of a plan laid end to end: what both directions of Winograd's method share.
#pragma once

#include <cstdint>

#include "engine.h"
#include "plan/plan.h"
#include "runtime/dispatch.h"
#include "runtime/storage.h"

namespace patchsparse {

constexpr int32_t COMPONENTS = 16;  // products per tile and pair of channels

// Tiles [0, count()) of a 3x3 convolution with stride 1 on patches of even height and width.
class WinogradTiles {
  public:
    explicit WinogradTiles(const ps_plan& plan)
        : plan_(plan), down_(plan.geometry.source[0] / 2), across_(plan.geometry.source[1] / 2) {}

    static bool fit(const ps_plan& plan) {
        const ps_geometry& g = plan.geometry;
        for (int side = 0; side < 2; ++side)
            if (g.kernel[side] != 3 || g.stride[side] != 1 || g.padding[side] != 1 || g.dilation[side] != 1 ||
                g.source[side] % 2)
                return false;
        return g.adjoint == 0;
    }

    int64_t count() const { return plan_.geometry.patches * down_ * across_; }
    int64_t pitch() const { return 2 * across_; }  // rows from one line of pixels to the next
    int64_t halo_row() const { return plan_.axis[1].halo; }

    // The row of the tile's first target.
    int32_t row(int64_t tile) const { return int32_t(tile / across_ * 2 * pitch() + tile % across_ * 2); }

    // The source rows of its 4x4 sources, in the halo of its patch.
    const int32_t* halo(int64_t tile) const {
        const int64_t patch = tile / (down_ * across_), within = tile % (down_ * across_);
        return plan_.halo_of(patch) + within / across_ * 2 * halo_row() + within % across_ * 2;
    }

  private:
    const ps_plan& plan_;
    const int64_t down_, across_;
};

template <template <class> class Method, class T, class Args>
bool run_method(const Args& args) {
    const Kernels<T>* table = Storage<T>::offers(args.weight_dtype) ? kernels<T>(args.isa) : nullptr;
    if (table != nullptr) Method<T>(args, *table).run();
    return table != nullptr;
}

// Run Method<T>, T being what the sums of `args` are made in.
template <template <class> class Method, class Args>
bool run_winograd(const Args& args) {
    if (!WinogradTiles::fit(*args.plan)) return false;
    if (args.dtype == PS_F32 || args.dtype == PS_BF16) return run_method<Method, float>(args);
    return args.dtype == PS_F64 && run_method<Method, double>(args);
}

}  // namespace patchsparse
