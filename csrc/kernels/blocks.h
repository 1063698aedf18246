// What the loops of blocks.inl are told: bfloat16 in blocks of 32 x 32 results, 32 channels or pairs of rows at a time.
#pragma once

#include <cstdint>

#include "kernels/bf16.h"
#include "kernels/gemm.h"

namespace patchsparse {

constexpr int64_t BF16_TILE = 32;  // rows, columns and depth of a step

// The sum over taps j of the products of the source's rows in[j] with panel[taps[j]] (steps, 2, 16, 16, 2). It is
// stored in the rows `out` of `target`, or added to those of `sum`. A step is 32 of `depth`.
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

// result[a, b] = or += sum over pairs of rows: p[a] * q[b], a < rows, b < columns.
struct Bf16OuterArgs {
    const Bf16 *p, *q;  // as gathered
    int64_t steps;
    float* result;
    int64_t result_stride;
    int32_t rows, columns;
    bool accumulate;
};

}  // namespace patchsparse
