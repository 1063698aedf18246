// The squares of a plan: which of them meet, for depthwise convolutions with stride 1.
#pragma once

#include "plan/plan.h"

namespace patchsparse {

// Fill plan.squares from plan.halo; plan.squares.side stays 0 where the geometry goes another way.
void build_squares(ps_plan& plan, int threads);

}  // namespace patchsparse
