// The halo of a plan: the source row of each pixel of every patch, and around it.
#pragma once

#include <cstdint>

#include "plan/plan.h"

namespace patchsparse {

// Fill plan.axis and plan.halo from plan.geometry, the slot map (B, Gh, Gw) and the coordinates (N, 3) of the patches.
void build_halo(ps_plan& plan, const int32_t* slot, const int32_t* coords, int threads);

}  // namespace patchsparse
