// What the loops of pack.inl are told.
#pragma once

#include <cstdint>

namespace patchsparse {

// panel[(tap * depth + k) * Kernels::columns + n] = weight[n * stride[0] + k * stride[1] + tap offset], and 0 for
// n >= columns.
template <class T>
struct PackArgs {
    const void* weight;
    const int64_t* stride;  // of (n, k, tap row, tap column)
    int32_t kernel[2];
    int64_t depth;
    int32_t columns;
    T* panel;
};

}  // namespace patchsparse
