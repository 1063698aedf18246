// What the loops of squares.inl are told: depthwise convolution by pairs of squares.
#pragma once

#include <cstdint>

namespace patchsparse {

// Two squares that lie alike: source pixel (sy, sx) meets target pixel (ty, tx) at tap (tap[0] + sy - ty,
// tap[1] + sx - tx). Bit d + 1 of `reach` says whether tap + d exists, d = -1, 0, 1.
struct SquareShift {
    int32_t tap[2], reach[2];
};

struct SquarePair {
    int32_t source, target;  // in the lists of a chunk
};

// `columns` channels from `first` on of the target squares of a chunk: at most one vector of 2x2 pixels, four of 1x1.
template <class T>
struct SquaresArgs {
    const void* source;
    void* target;
    int64_t channels;
    int32_t side, pitch;               // pixels of a square; rows from one line of pixels to the next
    const int32_t *sources, *targets;  // row of each square's first pixel
    int32_t source_count, target_count, shift_count;
    const SquareShift* shifts;
    const SquarePair* pairs;
    const int32_t* start;  // of each shift's pairs, and the end
    const T* weight;       // (taps, channels)
    const T* bias;
    int32_t kernel[2];
    bool flip;
    int64_t first;
    int32_t columns;
    T* scratch;  // four vectors for each square
};

}  // namespace patchsparse
