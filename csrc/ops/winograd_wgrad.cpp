// Weight gradient by Winograd's method: per component one product over all tiles, then 16 components -> 9 taps.
//
// The gradient of a component's weights is (row tiles of target channels) x (panels of source channels). A thread owns
// some row tiles of one row of four components. It adds over all tiles in a fixed order, so that the result does not
// depend on the number of threads, and in chunks whose components stay in the second-level cache.
#include <algorithm>
#include <numeric>

#include "ops/ops.h"
#include "ops/winograd.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace patchsparse {
namespace {

constexpr int64_t CHUNK = 256;  // tiles

template <class T>
class WinogradWgrad {
  public:
    WinogradWgrad(const ps_wgrad_args& args, const Kernels<T>& kernels);

    void run();

  private:
    struct Buffers {
        T *zeros, *source, *target;
    };

    // Add up the units [first, last) of all (row of components, row tile).
    void add_units(T* sums, int64_t first, int64_t last) const;

    // Add the tiles from `chunk` on to the components 4 * row .. 4 * row + 3 of the row tiles [low, high).
    void add_chunk(T* sums, int64_t chunk, int32_t row, int64_t low, int64_t high, const Buffers& buffers) const;

    int64_t first_row(int64_t tile) const { return args_.target_channels * tile / row_tiles_; }

    const ps_wgrad_args& args_;
    const Kernels<T>& kernels_;
    const Storage<T> images_, weights_;
    const WinogradTiles tiles_;
    const int64_t depth_;
    int64_t lane_, row_tiles_, panels_;
};

template <class T>
WinogradWgrad<T>::WinogradWgrad(const ps_wgrad_args& args, const Kernels<T>& kernels)
    : args_(args), kernels_(kernels), images_(kernels, args.dtype), weights_(kernels, args.weight_dtype),
      tiles_(*args.plan), depth_(args.source_channels) {
    lane_ = kernels.columns / 2;
    row_tiles_ = (args.target_channels + kernels.outer_rows - 1) / kernels.outer_rows;
    panels_ = (depth_ + kernels.columns - 1) / kernels.columns;
}

template <class T>
void WinogradWgrad<T>::run() {
    static thread_local Scratch kept;
    T* sums = kept.get<T>(COMPONENTS * args_.target_channels * depth_);
    auto share = [&](int thread, int team) {
        const int64_t units = 4 * row_tiles_;
        add_units(sums, units * thread / team, units * (thread + 1) / team);
    };
    parallel(int(std::min<int64_t>(args_.threads, 4 * row_tiles_)), share);
    parallel_for(args_.threads, args_.target_channels, [&](int64_t n) {
        weights_.kernels.winograd_wgrad({sums + n * depth_,
                                         args_.target_channels * depth_,
                                         depth_,
                                         weights_.at(args_.weight, n * args_.weight_stride[0]),
                                         {args_.weight_stride[2], args_.weight_stride[3]}});
    });
}

template <class T>
void WinogradWgrad<T>::add_units(T* sums, int64_t first, int64_t last) const {
    static thread_local Scratch kept;
    const int64_t wide = panels_ * kernels_.columns, mine = std::min(row_tiles_, last - first);
    T* memory = kept.get<T>(wide + 4 * CHUNK * (wide + mine * lane_));
    const Buffers buffers{memory, memory + wide, memory + wide + 4 * CHUNK * wide};
    std::fill(buffers.zeros, buffers.source, T(0));
    for (int64_t chunk = 0; chunk < std::max<int64_t>(1, tiles_.count()); chunk += CHUNK)
        for (int64_t row = first / row_tiles_; row * row_tiles_ < last; ++row)
            add_chunk(sums, chunk, int32_t(row), std::max<int64_t>(0, first - row * row_tiles_),
                      std::min(row_tiles_, last - row * row_tiles_), buffers);
}

template <class T>
void WinogradWgrad<T>::add_chunk(T* sums, int64_t chunk, int32_t row, int64_t low, int64_t high,
                                 const Buffers& buffers) const {
    const int64_t count = std::min(CHUNK, tiles_.count() - chunk);
    const int64_t panel = CHUNK * kernels_.columns, left = CHUNK * lane_;
    int32_t at[CHUNK];
    for (int64_t i = 0; i < count; ++i) {
        at[i] = tiles_.row(chunk + i);
        images_.kernels.winograd_source({args_.source, depth_, depth_, tiles_.halo(chunk + i), tiles_.halo_row(),
                                         buffers.zeros, row, row + 1, buffers.source + i * kernels_.columns,
                                         panels_ * panel, panel});
    }
    for (int64_t tile = low; tile < high; ++tile) {
        const int64_t n = first_row(tile);
        const int32_t read = int32_t(std::min(lane_, args_.target_channels - n));  // a whole vector where it can
        images_.kernels.winograd_gradient({images_.at(args_.target, n), args_.target_channels, count, at,
                                           tiles_.pitch(), read, row, buffers.target + (tile - low) * left,
                                           (high - low) * left});
    }
    for (int32_t e = 0; e < 4; ++e)
        for (int64_t tile = low; tile < high; ++tile)
            for (int64_t p = 0; p < panels_; ++p) {
                const int64_t n = first_row(tile), k = p * kernels_.columns;
                T* to = sums + ((row * 4 + e) * args_.target_channels + n) * depth_ + k;
                kernels_.outer({buffers.target + (e * (high - low) + tile - low) * left, nullptr, count,
                                buffers.source + (e * panels_ + p) * panel, to, depth_,
                                int32_t(first_row(tile + 1) - n),
                                int32_t(std::min<int64_t>(kernels_.columns, depth_ - k)), chunk > 0});
            }
}

}  // namespace

bool winograd_wgrad(const ps_wgrad_args& args) {
    return args.weight_stride[1] == 1 && run_winograd<WinogradWgrad>(args);
}

}  // namespace patchsparse
