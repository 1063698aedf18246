// Forward and input gradient by Winograd's method: 16 matrix products of tiles instead of 36 of pixels.
//
//   1. weights -> components, packed in panels, once for all threads
//   2. per thread, for its tiles, for each band of panels, for each block of tiles:
//        sources -> components (16, tiles, C_in)        from the halo, zeros where it is inactive
//        16 products with the components of a panel     sums (16, tiles, columns)
//        sums -> targets                                2x2 pixels of each tile
//
// A block's components and a band's weights stay in the second-level cache. Where there are several bands, the
// components of all blocks are kept for the next one.
#include <algorithm>
#include <numeric>

#include "ops/ops.h"
#include "ops/winograd.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace patchsparse {
namespace {

constexpr int64_t BAND_BYTES = 640 << 10;   // of weights
constexpr int64_t BLOCK_BYTES = 256 << 10;  // of components of the sources
constexpr int64_t KEPT_BYTES = 32 << 20;    // of all blocks of a thread
constexpr int64_t MOST_TILES = 96;          // of a block

template <class T>
class WinogradConv {
  public:
    WinogradConv(const ps_conv_args& args, const Kernels<T>& kernels);

    void run();

  private:
    // Step 1.
    void pack(T* weights) const;
    // Step 2, for the blocks of tiles [first, last).
    void compute(const T* weights, int64_t first, int64_t last) const;
    void transform(int64_t block, const T* zeros, T* out) const;
    void multiply(int64_t block, const T* components, const T* panel, int64_t p, T* sums) const;

    int64_t tiles_of(int64_t block) const { return std::min(block_, tiles_.count() - block * block_); }
    int32_t columns_at(int64_t panel) const {
        return int32_t(std::min<int64_t>(kernels_.columns, args_.target_channels - panel * kernels_.columns));
    }

    const ps_conv_args& args_;
    const Kernels<T>& kernels_;
    const Storage<T> images_, weights_;
    const WinogradTiles tiles_;
    const int64_t depth_;
    int64_t wide_;  // channels of a source, up to a whole vector
    int64_t panel_size_, panels_, block_, bands_;
};

template <class T>
WinogradConv<T>::WinogradConv(const ps_conv_args& args, const Kernels<T>& kernels)
    : args_(args), kernels_(kernels), images_(kernels, args.dtype), weights_(kernels, args.weight_dtype),
      tiles_(*args.plan), depth_(args.source_channels) {
    const int64_t lane = kernels.columns / 2;
    wide_ = (depth_ + lane - 1) / lane * lane;
    panel_size_ = COMPONENTS * depth_ * kernels.columns;
    panels_ = (args.target_channels + kernels.columns - 1) / kernels.columns;
    const int64_t bytes = COMPONENTS * wide_ * int64_t(sizeof(T));
    block_ = std::clamp<int64_t>(BLOCK_BYTES / bytes / kernels.rows, 1, MOST_TILES / kernels.rows) * kernels.rows;
    const int64_t most = std::max<int64_t>(1, BAND_BYTES / (panel_size_ * int64_t(sizeof(T))));
    bands_ = (panels_ + most - 1) / most;
}

template <class T>
void WinogradConv<T>::run() {
    static thread_local Scratch scratch;
    T* weights = scratch.get<T>(panels_ * panel_size_);
    pack(weights);
    const int64_t blocks = (tiles_.count() + block_ - 1) / block_;
    auto share = [&](int thread, int team) { compute(weights, blocks * thread / team, blocks * (thread + 1) / team); };
    parallel(int(std::min<int64_t>(args_.threads, blocks)), share);
}

template <class T>
void WinogradConv<T>::pack(T* weights) const {
    auto share = [&](int thread, int team) {
        static thread_local Scratch scratch;
        T* taps = scratch.get<T>(9 * depth_ * kernels_.columns);
        for (int64_t p = panels_ * thread / team; p < panels_ * (thread + 1) / team; ++p) {
            const void* from = weights_.at(args_.weight, p * kernels_.columns * args_.weight_stride[0]);
            weights_.kernels.pack({from, args_.weight_stride, {3, 3}, depth_, columns_at(p), taps});
            kernels_.winograd_weight({taps, weights + p * panel_size_, depth_});
        }
    };
    parallel(int(std::min<int64_t>(args_.threads, panels_)), share);
}

template <class T>
void WinogradConv<T>::compute(const T* weights, int64_t first, int64_t last) const {
    static thread_local Scratch components_kept, sums_kept;
    const int64_t size = COMPONENTS * block_ * wide_;
    const bool keep = bands_ > 1 && (last - first) * size * int64_t(sizeof(T)) <= KEPT_BYTES;
    T* components = components_kept.get<T>(size * (keep ? std::max<int64_t>(1, last - first) : 1) + wide_);
    T* sums = sums_kept.get<T>(COMPONENTS * block_ * kernels_.columns);
    T* zeros = components;
    components += wide_;
    std::fill(zeros, components, T(0));
    for (int64_t band = 0; band < bands_; ++band)
        for (int64_t b = first; b < last; ++b) {
            T* at = components + (keep ? b - first : 0) * size;
            if (band == 0 || !keep) transform(b, zeros, at);
            for (int64_t p = panels_ * band / bands_; p < panels_ * (band + 1) / bands_; ++p)
                multiply(b, at, weights + p * panel_size_, p, sums);
        }
}

template <class T>
void WinogradConv<T>::transform(int64_t block, const T* zeros, T* out) const {
    for (int64_t i = 0; i < tiles_of(block); ++i)
        images_.kernels.winograd_source({args_.source, depth_, depth_, tiles_.halo(block * block_ + i),
                                         tiles_.halo_row(), zeros, 0, 4, out + i * wide_, block_ * wide_,
                                         kernels_.columns});
}

template <class T>
void WinogradConv<T>::multiply(int64_t block, const T* components, const T* panel, int64_t p, T* sums) const {
    static constexpr int32_t TAP = 0;  // a component is a convolution with one tap
    const int64_t count = tiles_of(block), parts = (count + kernels_.rows - 1) / kernels_.rows;
    int32_t rows[MOST_TILES], at[MOST_TILES];
    std::iota(rows, rows + count, 0);
    for (int64_t i = 0; i < count; ++i) at[i] = tiles_.row(block * block_ + i);
    for (int32_t e = 0; e < COMPONENTS; ++e)
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t low = count * part / parts, high = count * (part + 1) / parts;
            kernels_.tile({components + e * block_ * wide_, wide_, rows + low, count, &TAP, 1,
                           panel + e * depth_ * kernels_.columns, depth_, rows + low,
                           sums + e * block_ * kernels_.columns, kernels_.columns, nullptr, int32_t(high - low),
                           columns_at(p), false});
        }
    const int64_t column = p * kernels_.columns;
    const T* bias = static_cast<const T*>(args_.bias);
    images_.kernels.winograd_target({sums, block_ * kernels_.columns, count, at, tiles_.pitch(),
                                     images_.at(args_.target, column), args_.target_channels,
                                     bias == nullptr ? nullptr : bias + column, columns_at(p)});
}

}  // namespace

bool winograd_conv(const ps_conv_args& args) { return run_winograd<WinogradConv>(args); }

}  // namespace patchsparse
