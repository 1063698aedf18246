// Depthwise convolution with stride 1: which squares of pixels meet, and at which taps.
#include "plan/squares.h"

#include <algorithm>
#include <vector>

#include "runtime/threads.h"

namespace patchsparse {
namespace {

constexpr int64_t CHUNK = 64;  // target squares: with their sources they fit the first-level cache
constexpr int32_t WIDE = 8;    // pixels: rows of targets that kernels 3, 5 or 7 wide take whole (stencil.inl)

// The taps between two squares `by` squares apart along an axis: the middle one, and which of its neighbours exist.
struct Step {
    int32_t by, tap, reach;
};

std::vector<Step> steps_along(const Axis& axis, int32_t side) {
    std::vector<Step> steps;
    for (int32_t by = floor_div(-axis.before - 1, side); by * side + axis.before <= axis.taps; ++by) {
        Step step{by, by * side + axis.before, 0};
        for (int32_t d = 1 - side; d < side; ++d)
            if (step.tap + d >= 0 && step.tap + d < axis.taps) step.reach |= 1 << (d + 1);
        if (step.reach != 0) steps.push_back(step);
    }
    return steps;
}

// Lists the squares of a plan and the pairs of them that meet.
class Builder {
  public:
    Builder(const ps_plan& plan, int32_t side)
        : plan_(plan), v_(plan.axis[0]), h_(plan.axis[1]), side_(side), rows_(v_.target / side),
          columns_(h_.target / side), down_(steps_along(v_, side)), right_(steps_along(h_, side)) {}

    int64_t count() const { return int64_t(plan_.geometry.patches) * rows_ * columns_; }
    std::vector<SquareShift> shifts() const;
    // The pairs of target squares [first, last). `place` is -1 for every row, and is again afterwards.
    SquareChunk chunk(int64_t first, int64_t last, std::vector<int32_t>& place) const;

  private:
    int64_t patch(int64_t square) const { return square / (int64_t(rows_) * columns_); }
    int32_t top(int64_t square) const { return int32_t(square / columns_ % rows_) * side_; }
    int32_t left(int64_t square) const { return int32_t(square % columns_) * side_; }
    int32_t row_of(int64_t square) const {
        return int32_t((patch(square) * v_.target + top(square)) * h_.target + left(square));
    }

    // The first row of the source square, or a negative number. The halo has only the pixels that are read.
    int32_t source(int64_t square, const Step& down, const Step& right) const;

    const ps_plan& plan_;
    const Axis &v_, &h_;
    int32_t side_, rows_, columns_;
    std::vector<Step> down_, right_;
};

std::vector<SquareShift> Builder::shifts() const {
    std::vector<SquareShift> shifts;
    for (const Step& down : down_)
        for (const Step& right : right_) shifts.push_back({{down.tap, right.tap}, {down.reach, right.reach}});
    return shifts;
}

SquareChunk Builder::chunk(int64_t first, int64_t last, std::vector<int32_t>& place) const {
    SquareChunk chunk;
    for (int64_t i = first; i < last; ++i) chunk.targets.push_back(row_of(i));
    chunk.start.push_back(0);
    for (const Step& down : down_)
        for (const Step& right : right_) {
            for (int64_t i = first; i < last; ++i) {
                const int32_t row = source(i, down, right);
                if (row < 0) continue;
                if (place[row] < 0) {
                    place[row] = int32_t(chunk.sources.size());
                    chunk.sources.push_back(row);
                }
                chunk.pairs.push_back({place[row], int32_t(i - first)});
            }
            chunk.start.push_back(int32_t(chunk.pairs.size()));
        }
    for (int32_t row : chunk.sources) place[row] = -1;
    return chunk;
}

int32_t Builder::source(int64_t square, const Step& down, const Step& right) const {
    const int32_t y = down.reach == 4 ? 1 : 0, x = right.reach == 4 ? 1 : 0;
    const int32_t hy = top(square) + down.by * side_ + v_.before + y;
    const int32_t hx = left(square) + right.by * side_ + h_.before + x;
    const int32_t row = plan_.halo_of(patch(square))[int64_t(hy) * h_.halo + hx];
    return row < 0 ? row : row - y * h_.source - x;
}

}  // namespace

void build_squares(ps_plan& plan, int threads) {
    const ps_geometry& g = plan.geometry;
    for (int i = 0; i < 2; ++i)
        if (g.adjoint || g.stride[i] != 1 || g.dilation[i] != 1) return;
    const int32_t width = g.kernel[1];
    if (plan.axis[1].target >= WIDE && (width == 3 || width == 5 || width == 7)) return;
    Squares& squares = plan.squares;
    squares.side = g.source[0] % 2 == 0 && g.source[1] % 2 == 0 ? 2 : 1;
    const Builder builder(plan, squares.side);
    squares.shifts = builder.shifts();
    const int64_t count = builder.count();
    squares.chunks.resize((count + CHUNK - 1) / CHUNK);
    auto share = [&](int thread, int team) {
        const int64_t chunks = int64_t(squares.chunks.size());
        std::vector<int32_t> place(plan.source_rows(), -1);
        for (int64_t i = chunks * thread / team; i < chunks * (thread + 1) / team; ++i)
            squares.chunks[i] = builder.chunk(i * CHUNK, std::min(count, (i + 1) * CHUNK), place);
    };
    parallel(threads, share);
}

}  // namespace patchsparse
