// What the loops of gemm.inl are told.
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
    // count + OUTER_AHEAD of them, the last ones valid but only prefetched; or null: one vector apart.
    const int64_t* offsets;
    int64_t count;
    const T* panel;
    T* result;
    int64_t result_stride;
    int32_t rows, columns;
    bool accumulate;
};

}  // namespace patchsparse
