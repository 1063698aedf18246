// What the loops of stencil.inl are told: depthwise convolution by patches and by pixels.
#pragma once

#include <cstdint>

namespace patchsparse {

// Depthwise targets of one patch, channels [first, last); stride and dilation are 1.
template <class T>
struct DepthwiseArgs {
    const T* source;
    const int32_t* halo;  // the stencil of the first target
    int64_t halo_row;     // entries from one row to the next
    int32_t kernel[2];
    const T* weight;  // (taps, channels)
    const T* bias;
    T* target;  // (height, width, channels)
    int64_t channels, target_row;
    int32_t height, width;
    bool flip;
    int64_t first, last;
};

// Depthwise by pixel, channels [first, last): source rows `in` and their taps, `count` of them; target one row.
template <class T>
struct PixelArgs {
    const T* source;
    const int32_t *in, *taps;
    int32_t count;
    const T* weight;
    const T* bias;
    T* target;
    int64_t channels, first, last;
};

}  // namespace patchsparse
