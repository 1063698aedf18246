// The operations that engine.cpp exports, one function each.
#pragma once

#include "engine.h"

namespace patchsparse {

// Each returns false where the dtype, the geometry or the instruction set is not offered; what it computes stands in
// engine.h. It throws std::bad_alloc when out of memory.
bool conv(const ps_conv_args& args);       // where images are not bfloat16
bool conv_bf16(const ps_conv_args& args);  // where they are
bool wgrad(const ps_wgrad_args& args);
bool wgrad_bf16(const ps_wgrad_args& args);
bool winograd_conv(const ps_conv_args& args);
bool winograd_wgrad(const ps_wgrad_args& args);
bool depthwise(const ps_depthwise_args& args);
bool depthwise_wgrad(const ps_depthwise_args& args);
bool max_pool(const ps_pool_args& args);
bool max_pool_grad(const ps_pool_args& args);

}  // namespace patchsparse
