// The table of inner loops that each instruction set fills. Everything here runs on one thread.
#pragma once

#include <cstdint>

namespace patchsparse {

// target[out[r], 0..columns) = or += sum over taps j, channels k: source[in[j][r], k] * panel[taps[j]][k, 0..columns).
template <class T>
struct TileArgs {
    const T* source;
    int64_t source_stride;
    const int32_t* in;  // (tap_count, in_stride), the first `rows` of each
    int64_t in_stride;
    const int32_t* taps;
    int32_t tap_count;
    const T* panel;  // (taps, depth, Kernels::columns), zero beyond `columns`
    int64_t depth;
    const int32_t* out;
    T* target;
    int64_t target_stride;
    const T* bias;  // of these columns, or null for 0; unused when accumulating
    int32_t rows, columns;
    bool accumulate;
};

// panel[(tap * depth + k) * Kernels::columns + n] = weight[n * stride[0] + k * stride[1] + tap offset], 0 for n >= columns.
template <class T>
struct PackArgs {
    const void* weight;
    const int64_t* stride;  // of (n, k, tap row, tap column)
    int32_t kernel[2];
    int64_t depth;
    int32_t columns;
    T* panel;
};

// out[i, 0..columns) = source[at[i], 0..columns), i < count.
template <class T>
struct GatherArgs {
    const T* source;
    int64_t stride;
    const int32_t* at;
    int64_t count;
    int32_t columns;
    T* out;
};

constexpr int64_t OUTER_AHEAD = 12;  // pairs that `outer` prefetches ahead

// result[a, b] = or += sum over i < count: p[offset(i) + a] * panel[i, b], a < rows, b < columns.
template <class T>
struct OuterArgs {
    const T* p;
    const int64_t* offsets;  // count + OUTER_AHEAD of them, the last ones valid but only prefetched; or null: one vector apart
    int64_t count;
    const T* panel;
    T* result;
    int64_t result_stride;
    int32_t rows, columns;
    bool accumulate;
};

// --- Depthwise convolution by pairs of squares (squares.inl) -----------------------------------------------------------

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

// Depthwise targets of one patch, channels [first, last); stride and dilation are 1.
template <class T>
struct DepthwiseArgs {
    const T* source;
    const int32_t* halo;  // the window of the first target
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

// --- Winograd's F(2x2, 3x3): a tile of 2x2 targets from 4x4 sources, as 16 components of the same shape as a kernel's taps

// out[e, channel] = component e of one tile's sources; e counts from 4 * first to 4 * last. Channels lie in groups of
// Kernels::columns, `group` elements apart; the last vector is filled up with zeros.
template <class T>
struct WinogradSourceArgs {
    const void* source;
    int64_t source_stride, channels;
    const int32_t* halo;  // of the tile's first pixel
    int64_t halo_row;
    const void* zeros;  // a row for pixels that are not active
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

// --- The tables --------------------------------------------------------------------------------------------------------

using Bf16 = uint16_t;

// What reads and writes weights (`pack`, `winograd_wgrad`) or images, which are stored as T or as bfloat16.
template <class T>
struct StoredKernels {
    void (*pack)(const PackArgs<T>&);
    void (*winograd_source)(const WinogradSourceArgs<T>&);
    void (*winograd_target)(const WinogradTargetArgs<T>&);
    void (*winograd_gradient)(const WinogradGradientArgs<T>&);
    void (*winograd_wgrad)(const WinogradWgradArgs<T>&);
};

template <class T>
struct Kernels {
    int32_t rows, outer_rows, columns;  // largest tile
    StoredKernels<T> own, bf16;
    void (*tile)(const TileArgs<T>&);
    void (*gather)(const GatherArgs<T>&);       // out is (count, columns of the table), zero-filled
    void (*gather_left)(const GatherArgs<T>&);  // out is (count, half of them): one vector per row
    void (*outer)(const OuterArgs<T>&);
    void (*narrow)(const T* from, Bf16* to, int64_t count);
    void (*winograd_weight)(const WinogradWeightArgs<T>&);
    // Weight gradients: `target` is read, the result is added to gradient (taps, channels).
    void (*depthwise_patch)(const DepthwiseArgs<T>&);  // kernels 3, 5 or 7 wide; null where it would not pay for its size
    void (*depthwise_patch_wgrad)(const DepthwiseArgs<T>&, T* gradient);
    void (*depthwise_squares)(const SquaresArgs<T>&);
    void (*depthwise_squares_wgrad)(const SquaresArgs<T>&, T* gradient);
    void (*depthwise_pixel)(const PixelArgs<T>&);
    void (*depthwise_pixel_wgrad)(const PixelArgs<T>&, T* gradient);
    void (*pool_max)(const T* value, int32_t tap, T* best, uint8_t* at, int64_t channels);  // value null: zeros
    void (*pool_add)(const T* gradient, const uint8_t* at, int32_t tap, T* sum, int64_t channels);
};

// --- bfloat16: blocks of 32 x 32 results, 32 channels or pairs of rows at a time ---------------------------------------

constexpr int64_t BF16_TILE = 32;  // rows, columns and depth of a step

// sum over taps j of the products of the source's rows in[j] with panel[taps[j]] (steps, 2, 16, 16, 2), then stored in the
// rows `out` of `target`, or added to those of `sum`. A step is 32 of `depth`.
struct Bf16TileArgs {
    const Bf16* blocks;  // (tap_count, steps, 32 rows, 32): the rows gathered, where the table has a `gather`
    const Bf16* source;  // elsewhere they are read where they lie, `depth` apart
    const int32_t* in;   // (tap_count, in_stride), the first `rows` of each
    int64_t in_stride;
    const int32_t* taps;
    int32_t tap_count;
    const Bf16* panel;
    int64_t depth;
    const int32_t* out;
    Bf16* target;
    float* sum;  // null: store in target
    int64_t target_stride;
    const Bf16* bias;
    int32_t rows, columns;
};

// One tap's weights (columns n, depth k) at n * stride[0] + k * stride[1] -> panel (steps, 2, 16, 16, 2), zero-filled.
struct Bf16PackArgs {
    const Bf16* weight;
    int64_t stride[2];
    int64_t depth;
    int32_t columns;
    Bf16* panel;
};

struct Bf16OuterArgs {
    const Bf16 *p, *q;  // as gathered
    int64_t steps;
    float* result;
    int64_t result_stride;
    int32_t rows, columns;
    bool accumulate;
};

struct Bf16Kernels {
    void (*begin)();  // once per thread and call, before any other
    void (*end)();
    void (*pack)(const Bf16PackArgs&);
    void (*gather)(const GatherArgs<Bf16>&);  // rows -> (steps, 32 rows, 32), zero-filled; or null
    void (*tile)(const Bf16TileArgs&);
    void (*gather_p)(const GatherArgs<Bf16>&);  // 32 columns of pairs of rows: left side of `outer`, as the table likes it
    void (*gather_q)(const GatherArgs<Bf16>&);  // (steps, 2, 16 pairs, 16 columns, 2): right side
    void (*outer)(const Bf16OuterArgs&);
    void (*narrow)(const float* from, Bf16* to, int64_t count);
};

const Bf16Kernels* kernels_avx512_bf16();
const Bf16Kernels* kernels_amx();

const Kernels<float>* kernels_portable_f32();
const Kernels<double>* kernels_portable_f64();
const Kernels<float>* kernels_avx2_f32();
const Kernels<float>* kernels_avx512_f32();

// The table of an instruction set, or null if this build or processor lacks it.
template <class T>
const Kernels<T>* kernels(int32_t isa);
const Bf16Kernels* kernels_bf16(int32_t isa);

}  // namespace patchsparse
