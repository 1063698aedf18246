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
    const T* weight;
    const int64_t* stride;  // of (n, k, tap row, tap column)
    int32_t kernel[2];
    int64_t depth;
    int32_t columns;
    T* panel;
};

// panel[i, 0..columns) = q[rows_of_q[i], 0..columns), 0 beyond; Kernels::columns wide.
template <class T>
struct GatherArgs {
    const T* q;
    int64_t q_stride;
    const int32_t* rows_of_q;
    int64_t count;
    int32_t columns;
    T* panel;
};

// result[a, b] = or += sum over i < count: p[rows_of_p[i], a] * panel[i, b], a < rows, b < columns.
template <class T>
struct OuterArgs {
    const T* p;
    int64_t p_stride;
    const int32_t* rows_of_p;
    int64_t count;
    const T* panel;
    T* result;
    int64_t result_stride;
    int32_t rows, columns;
    bool accumulate;
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

template <class T>
struct Kernels {
    int32_t rows, outer_rows, columns;  // largest tile
    void (*tile)(const TileArgs<T>&);
    void (*pack)(const PackArgs<T>&);
    void (*gather)(const GatherArgs<T>&);
    void (*outer)(const OuterArgs<T>&);
    // Kernels 3, 5 or 7 wide; null where the compiled code would not pay for its size.
    void (*depthwise_patch)(const DepthwiseArgs<T>&);
    void (*depthwise_pixel)(const PixelArgs<T>&);
    // Weight gradients: `target` is read, the result is added to gradient (taps, channels).
    void (*depthwise_patch_wgrad)(const DepthwiseArgs<T>&, T* gradient);
    void (*depthwise_pixel_wgrad)(const PixelArgs<T>&, T* gradient);
    void (*pool_max)(const T* value, int32_t tap, T* best, uint8_t* at, int64_t channels);  // value null: zeros
    void (*pool_add)(const T* gradient, const uint8_t* at, int32_t tap, T* sum, int64_t channels);
};

const Kernels<float>* kernels_portable_f32();
const Kernels<double>* kernels_portable_f64();
const Kernels<float>* kernels_avx2_f32();
const Kernels<float>* kernels_avx512_f32();

// The table of an instruction set, or null if this build or processor lacks it.
template <class T>
const Kernels<T>* kernels(int32_t isa);

}  // namespace patchsparse
