// The public C interface of the CPU engine: pointers and sizes only, no torch and no Python.
//
// A packed tensor (N, C, h, w) in channels_last memory is a matrix of N * h * w rows of C values. A plan says which
// source row each target row reads at each tap; it depends on the mask and the geometry alone, so the layers of a
// stage share it. Functions are re-entrant; a plan may be used by many threads at once.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define PS_API __declspec(dllexport)
#else
#define PS_API __attribute__((visibility("default")))
#endif

typedef struct ps_plan ps_plan;

// Instruction sets, each including those before it.
enum { PS_PORTABLE = 0, PS_AVX2 = 1, PS_AVX512 = 2, PS_AVX512_BF16 = 3, PS_AMX = 4 };
enum { PS_F32 = 0, PS_F64 = 1, PS_BF16 = 2 };  // PS_BF16: by Winograd's method; direct, from PS_AVX512_BF16 on
// What functions return: done; no memory; numbers or maps out of range; a dtype, geometry or instruction set that is
// not offered; anything else.
enum { PS_OK = 0, PS_NO_MEMORY = 1, PS_INVALID = 2, PS_REFUSED = 3, PS_FAILED = 4 };
enum { PS_NO_LISTS = 0, PS_GROUPS = 1, PS_SQUARES = 2 };  // what a plan holds besides the halo

// What is read by what. `adjoint` = 0: targets are the outputs of a stencil operation and sources its inputs;
// `adjoint` = 1: the other way round (strided input gradients). Pairs are (vertical, horizontal).
// `lists` are those that an operation reads: PS_GROUPS for ps_conv and ps_wgrad, PS_SQUARES for depthwise ones.
typedef struct {
    int32_t images, patches, grid_rows, grid_columns, adjoint, lists;
    int32_t source[2], kernel[2], stride[2], padding[2], dilation[2];
} ps_geometry;

// One multiplication: target[o, :] (+)= sum over taps of source[i(o, tap), :] * weight[tap]. The weight of (target
// channel n, source channel k, tap row y, tap column x) lies at weight[n * s[0] + k * s[1] + y * s[2] + x * s[3]],
// in elements; strides may be negative. `bias` may be null. Weights are stored as `weight_dtype`: `dtype` or PS_BF16.
typedef struct {
    const ps_plan* plan;
    const void* source;
    const void* weight;
    int64_t weight_stride[4];
    const void* bias;
    void* target;
    int64_t source_channels, target_channels;
    int32_t weight_dtype, dtype, isa, threads;
} ps_conv_args;

// weight gradient[n, k, y, x] = sum over pairs of target[o, n] * source[i(o, tap), k]. The first or the second stride
// is 1.
typedef struct {
    const ps_plan* plan;
    const void* source;
    const void* target;
    void* weight;
    int64_t weight_stride[4];
    int64_t source_channels, target_channels;
    int32_t weight_dtype, dtype, isa, threads;
} ps_wgrad_args;

// Depthwise: `weight` and its gradient are (taps, channels), contiguous. `flip` reads the taps in reverse order.
typedef struct {
    const ps_plan* plan;
    const void* source;
    const void* weight;
    const void* bias;
    void* target;
    int64_t channels;
    int32_t flip, dtype, isa, threads;
} ps_depthwise_args;

// Max-pooling: forward reads source and writes target and tap; backward (adjoint plan) reads source and tap.
typedef struct {
    const ps_plan* plan;
    const void* source;
    uint8_t* tap;
    void* target;
    int64_t channels;
    int32_t dtype, isa, threads;
} ps_pool_args;

// Version of this interface; the loader refuses another one.
PS_API int32_t ps_abi(void);

// Return 1 if this processor and this build can run an instruction set, else 0.
PS_API int32_t ps_isa_supported(int32_t isa);

// Hand over the OpenMP runtime of the process: GOMP_parallel, omp_get_thread_num, omp_get_num_threads.
// The engine links none, so it can never bring a second one. Null pointers: run on the calling thread.
PS_API void ps_set_runtime(void* parallel, void* thread_num, void* num_threads);

// Derive a plan from the slot map (images, Gh, Gw) and the coordinates (patches, 3) of the packed patches, and return a
// status. A map may hold anything: where it would lead out of the images or the packed rows the status is PS_INVALID.
PS_API int32_t ps_plan_create(const ps_geometry* geometry, const int32_t* slot, const int32_t* coords, int32_t threads,
                              ps_plan** plan);
PS_API void ps_plan_destroy(ps_plan* plan);

// Write five numbers: {target rows, source rows, active pairs, groups, groups whose rows are stored once}.
PS_API void ps_plan_statistics(const ps_plan* plan, int64_t* out);

// Each returns a status.
PS_API int32_t ps_conv(const ps_conv_args* args);
PS_API int32_t ps_wgrad(const ps_wgrad_args* args);
// 3x3, stride 1, padding 1, patches of even sides. With PS_BF16 sources and targets are bfloat16 and the bias float32;
// weights are either.
PS_API int32_t ps_winograd_conv(const ps_conv_args* args);
PS_API int32_t ps_winograd_wgrad(const ps_wgrad_args* args);  // the same; weight_stride[1] is 1
PS_API int32_t ps_depthwise(const ps_depthwise_args* args);
PS_API int32_t ps_depthwise_wgrad(const ps_depthwise_args* args);  // bias unused; source, target read; weight written
PS_API int32_t ps_max_pool(const ps_pool_args* args);
PS_API int32_t ps_max_pool_grad(const ps_pool_args* args);

#ifdef __cplusplus
}
#endif
