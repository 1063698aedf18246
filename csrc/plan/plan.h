// Which source row each target row reads at each tap: the slot map turned into lists of rows.
#pragma once

#include <cstdint>
#include <vector>

#include "engine.h"
#include "kernels/squares.h"

namespace patchsparse {

constexpr int32_t INACTIVE = -1;  // pixel of an inactive patch
constexpr int32_t OUTSIDE = -2;   // pixel beyond the image

// a / b, rounded down; b is positive.
inline int32_t floor_div(int32_t a, int32_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// One axis of a stencil operation: at[target * taps + tap] is the halo coordinate that is read, or -1.
// Targets of one kind read the same neighbouring patches at every tap.
struct Axis {
    int32_t source, target, taps, before, halo;
    std::vector<int32_t> at;
    std::vector<int32_t> kind;
    std::vector<std::vector<int32_t>> members;
};

// Target rows that have the same active taps. in is (taps, rows); tap ids ascend.
struct Group {
    int32_t rows, tap_count;
    int64_t taps, out, in;  // where each list begins in the plan's arrays
};

// What one thread computes undivided: a group whose rows appear nowhere else and are stored once, or (`shared`)
// a block of rows that several groups of one tap each add to, because each row's set of taps is too rare to batch.
struct Unit {
    int32_t first, last;  // groups
    bool shared;
    int64_t rows, row_count;  // shared: the rows to initialise, in ps_plan::out_rows
};

// Squares of 2x2 pixels, or of 1x1 where a side of the patches is odd. A square is active as a whole or not at all, so
// a depthwise convolution with stride 1 is a list of pairs of squares for each shift between them.
struct SquareChunk {
    std::vector<int32_t> targets, sources;  // row of each square's first pixel
    std::vector<SquarePair> pairs;          // of all shifts, one after the other
    std::vector<int32_t> start;             // of each shift's pairs, and the end
};

struct Squares {
    int32_t side = 0;  // 0: they were not asked for, or the geometry has none
    std::vector<SquareShift> shifts;
    std::vector<SquareChunk> chunks;
};

}  // namespace patchsparse

struct ps_plan {
    ps_geometry geometry;
    patchsparse::Axis axis[2];
    std::vector<int32_t> halo;  // (patches, halo height, halo width): source row, INACTIVE or OUTSIDE

    std::vector<patchsparse::Group> groups;
    std::vector<patchsparse::Unit> units;
    std::vector<int32_t> tap_ids, out_rows, in_rows;

    patchsparse::Squares squares;

    int32_t taps() const { return axis[0].taps * axis[1].taps; }
    int64_t target_rows() const { return int64_t(geometry.patches) * axis[0].target * axis[1].target; }
    int64_t source_rows() const { return int64_t(geometry.patches) * axis[0].source * axis[1].source; }
    const int32_t* halo_of(int64_t patch) const { return halo.data() + patch * axis[0].halo * axis[1].halo; }
};
