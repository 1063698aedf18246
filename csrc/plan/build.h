// Building a plan: the halo, and the lists that its geometry asks for.
#pragma once

#include <cstdint>
#include <memory>

#include "plan/plan.h"

namespace patchsparse {

// Build a plan from the slot map (images, Gh, Gw) and the coordinates (N, 3) of the packed patches. Throw bad_alloc
// without memory, and invalid_argument for numbers or maps that lead out of them.
std::unique_ptr<ps_plan> build_plan(const ps_geometry& geometry, const int32_t* slot, const int32_t* coords,
                                    int threads);

}  // namespace patchsparse
