// The table of inner loops that an instruction set has on this processor.
#pragma once

#include <cstdint>

#include "kernels/tables.h"

namespace patchsparse {

// Whether this processor and this build can run an instruction set (PS_PORTABLE ... PS_AMX).
bool isa_supported(int32_t isa);

// The table of an instruction set, or null if this build or processor lacks it.
template <class T>
const Kernels<T>* kernels(int32_t isa);
template <>
const Kernels<float>* kernels<float>(int32_t isa);
template <>
const Kernels<double>* kernels<double>(int32_t isa);
const Bf16Kernels* kernels_bf16(int32_t isa);

}  // namespace patchsparse
