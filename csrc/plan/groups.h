// The groups of a plan: target rows with the same active taps, for ps_conv and ps_wgrad.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/plan.h"

namespace patchsparse {

// Fill plan.groups, plan.units and their lists of rows from plan.halo.
void build_groups(ps_plan& plan, int threads);

// Where the cost of each unit begins, in row * tap products, and the end: shares of threads are cut there.
std::vector<int64_t> unit_costs(const ps_plan& plan);

}  // namespace patchsparse
