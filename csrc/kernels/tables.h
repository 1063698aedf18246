// The tables of inner loops that each instruction set fills. Each loop runs on one thread.
#pragma once

#include <cstdint>

#include "kernels/bf16.h"
#include "kernels/blocks.h"
#include "kernels/gemm.h"
#include "kernels/pack.h"
#include "kernels/squares.h"
#include "kernels/stencil.h"
#include "kernels/winograd.h"

namespace patchsparse {

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
    int32_t rows, outer_rows, columns;  // the largest tile: rows of `tile`, rows of `outer`, columns of both
    StoredKernels<T> own, bf16;
    void (*tile)(const TileArgs<T>&);
    void (*gather)(const GatherArgs<T>&);       // out is (count, columns of the table), zero-filled
    void (*gather_left)(const GatherArgs<T>&);  // out is (count, half of them): one vector per row
    void (*outer)(const OuterArgs<T>&);
    void (*narrow)(const T* from, Bf16* to, int64_t count);
    void (*winograd_weight)(const WinogradWeightArgs<T>&);
    // Weight gradients: `target` is read, the result is added to gradient (taps, channels).
    void (*depthwise_patch)(const DepthwiseArgs<T>&);  // kernels 3, 5 or 7 wide; null: not worth its size here
    void (*depthwise_patch_wgrad)(const DepthwiseArgs<T>&, T* gradient);
    void (*depthwise_squares)(const SquaresArgs<T>&);
    void (*depthwise_squares_wgrad)(const SquaresArgs<T>&, T* gradient);
    void (*depthwise_pixel)(const PixelArgs<T>&);
    void (*depthwise_pixel_wgrad)(const PixelArgs<T>&, T* gradient);
    void (*pool_max)(const T* value, int32_t tap, T* best, uint8_t* at, int64_t channels);  // value null: zeros
    void (*pool_add)(const T* gradient, const uint8_t* at, int32_t tap, T* sum, int64_t channels);
};

// The direct way in bfloat16.
struct Bf16Kernels {
    void (*begin)();  // once per thread and call, before any other
    void (*end)();
    void (*pack)(const Bf16PackArgs&);
    void (*gather)(const GatherArgs<Bf16>&);  // rows -> (steps, 32 rows, 32), zero-filled; or null
    void (*tile)(const Bf16TileArgs&);
    void (*gather_p)(const GatherArgs<Bf16>&);  // left side of `outer`: 32 columns of pairs of rows
    void (*gather_q)(const GatherArgs<Bf16>&);  // right side: (steps, 2, 16 pairs, 16 columns, 2)
    void (*outer)(const Bf16OuterArgs&);
    void (*narrow)(const float* from, Bf16* to, int64_t count);
};

// The tables of each file that is built for an instruction set; null where the compiler does not know its flags.
const Bf16Kernels* kernels_avx512_bf16();
const Bf16Kernels* kernels_amx();
const Kernels<float>* kernels_portable_f32();
const Kernels<double>* kernels_portable_f64();
const Kernels<float>* kernels_avx2_f32();
const Kernels<float>* kernels_avx512_f32();

}  // namespace patchsparse
