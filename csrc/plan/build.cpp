// Building a plan: the halo first, then the lists that are made of it.
#include "plan/build.h"

#include <algorithm>
#include <stdexcept>

#include "plan/groups.h"
#include "plan/halo.h"
#include "plan/squares.h"

namespace patchsparse {

namespace {

// Throw invalid_argument for numbers that do not fit together, or whose rows and pixels int32 cannot count.
void check(const ps_geometry& g) {
    bool right = g.images >= 0 && g.patches >= 0 && g.grid_rows >= 1 && g.grid_columns >= 1 && g.lists >= PS_NO_LISTS &&
                 g.lists <= PS_SQUARES;
    int64_t taps = 1, sources = g.patches, targets = g.patches;
    for (int side = 0; side < 2 && right; ++side) {
        const int64_t p = g.source[side], k = g.kernel[side], s = g.stride[side], d = g.dilation[side];
        right = p >= 1 && k >= 1 && s >= 1 && d >= 1 && g.padding[side] >= 0;
        right = right && p * s + d * (k - 1) + g.padding[side] <= INT32_MAX;
        if (!right) break;
        taps *= k;
        sources *= p;
        targets *= g.adjoint ? p * s : p / s;
        right = std::max({taps, sources, targets}) <= INT32_MAX;
    }
    if (!right) throw std::invalid_argument("geometry");
}

}  // namespace

std::unique_ptr<ps_plan> build_plan(const ps_geometry& geometry, const int32_t* slot, const int32_t* coords,
                                    int threads) {
    check(geometry);
    auto plan = std::make_unique<ps_plan>();
    plan->geometry = geometry;
    build_halo(*plan, slot, coords, threads);
    if (geometry.lists == PS_GROUPS) build_groups(*plan, threads);
    if (geometry.lists == PS_SQUARES) build_squares(*plan, threads);
    return plan;
}

}  // namespace patchsparse
