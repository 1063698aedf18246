// The groups of a plan: target rows with the same active taps, for ps_conv and ps_wgrad.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/plan.h"

namespace patchsparse {

// Fill plan.groups, plan.units and their lists of rows from plan.halo.
void build_groups(ps_plan& plan, int threads);

// Where the cost of each unit begins, in products of a row and a tap, and the end. Threads share the work by it.
std::vector<int64_t> unit_costs(const ps_plan& plan);

}  // namespace patchsparse
