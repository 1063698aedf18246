// Building a plan: the halo first, then the lists that are made of it.
#include "plan/build.h"

#include "plan/groups.h"
#include "plan/halo.h"
#include "plan/squares.h"

namespace patchsparse {

std::unique_ptr<ps_plan> build_plan(const ps_geometry& geometry, const int32_t* slot, const int32_t* coords,
                                    int threads) {
    auto plan = std::make_unique<ps_plan>();
    plan->geometry = geometry;
    build_halo(*plan, slot, coords, threads);
    if (geometry.lists == PS_GROUPS) build_groups(*plan, threads);
    if (geometry.lists == PS_SQUARES) build_squares(*plan, threads);
    return plan;
}

}  // namespace patchsparse
