// The operations that engine.cpp exports, one function each.
#pragma once

#include "engine.h"

namespace patchsparse {

// Each returns false when out of memory or where the dtype, the geometry or the instruction set is not offered; what it
// computes stands in engine.h. It may throw std::bad_alloc.
bool conv(const ps_conv_args& args);
bool wgrad(const ps_wgrad_args& args);
bool winograd_conv(const ps_conv_args& args);
bool winograd_wgrad(const ps_wgrad_args& args);
bool depthwise(const ps_depthwise_args& args);
bool depthwise_wgrad(const ps_depthwise_args& args);
bool max_pool(const ps_pool_args& args);
bool max_pool_grad(const ps_pool_args& args);

// conv and wgrad where images and weights are bfloat16, on an instruction set that multiplies it.
bool conv_bf16(const ps_conv_args& args);
bool wgrad_bf16(const ps_wgrad_args& args);

}  // namespace patchsparse
