// What the loops of winograd.inl are told. A tile is 2x2 targets from 4x4 sources, as 16 components of the same shape
// as the taps of a kernel.
#pragma once

#include <cstdint>

namespace patchsparse {

// out[e, channel] = component e of one tile's sources; e counts from 4 * first to 4 * last. Channels lie in groups of
// Kernels::columns, `group` elements apart; the last vector is filled up with zeros.
template <class T>
struct WinogradSourceArgs {
    const void* source;
    int64_t source_stride, channels;
    const int32_t* halo;  // of the tile's first pixel
    int64_t halo_row;
    const void* zeros;    // a row for pixels that are not active
    int32_t first, last;  // rows of components
    T* out;
    int64_t component, group;
};

// to (16, depth, Kernels::columns) = components of from (9, depth, Kernels::columns).
template <class T>
struct WinogradWeightArgs {
    const T* from;
    T* to;
    int64_t depth;
};

// The 2x2 targets of `count` tiles, whose first pixels are the rows `at`, from sums (16, `component` elements apart) of
// (count, Kernels::columns).
template <class T>
struct WinogradTargetArgs {
    const T* sums;
    int64_t component, count;
    const int32_t* at;
    int64_t pitch;  // rows from one line of pixels to the next
    void* target;
    int64_t target_stride;
    const T* bias;
    int32_t columns;
};

// out[e - 4 * row, i] = component e of the targets' gradients of tile i: one vector, of which `columns` are read.
template <class T>
struct WinogradGradientArgs {
    const void* target;
    int64_t target_stride, count;
    const int32_t* at;
    int64_t pitch;
    int32_t columns, row;  // row of components
    T* out;
    int64_t component;
};

// weight[k * 1 + y * stride[0] + x * stride[1]] from sums (16, `component` elements apart) of (channels).
template <class T>
struct WinogradWgradArgs {
    const T* sums;
    int64_t component, channels;
    void* weight;
    int64_t stride[2];
};

}  // namespace patchsparse
