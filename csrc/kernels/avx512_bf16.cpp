// bfloat16 by vectors of pairs (AVX512_BF16): built with its flags (flags.txt), chosen at run time
// (runtime/dispatch.cpp).
//
// One instruction multiplies 16 pairs of a right block by one pair of a left row and adds to 16 float32 sums: twice the
// products of a float32 multiply-add. 11 or 10 rows of 2 vectors stay in registers for all taps.
#include "kernels/tables.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

#include "kernels/simd_avx512.h"

namespace patchsparse {
namespace {

#include "kernels/blocks.inl"

constexpr int ROWS = 11;  // 32 rows are cut into 11, 11 and 10

// Sums of R rows by N vectors of columns.
template <int R, int N>
struct Sums {
    __m512 v[R][N];

    Sums() {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) v[r][n] = _mm512_setzero_ps();
    }

    // Add the products of one pair of each row, pair(r), with a row of pairs of the right side.
    template <class Pair>
    void add(Pair pair, const Bf16* right) {
        __m512bh b[N];
        for (int n = 0; n < N; ++n) b[n] = (__m512bh)_mm512_load_si512(right + n * BLOCK);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(pair(r));
            for (int n = 0; n < N; ++n) v[r][n] = _mm512_dpbf16_ps(v[r][n], x, b[n]);
        }
    }

    // Add the products of all `depth` of each row. Its pairs lie NEXT apart; the next 32 begin `step` further.
    template <int NEXT>
    void add_rows(const Bf16* const (&row)[R], int64_t step, int64_t depth, const Bf16* right) {
        auto pair_at = [&](int64_t at) {
            return [&row, at](int r) {
                int32_t pair;
                __builtin_memcpy(&pair, row[r] + at, sizeof pair);
                return pair;
            };
        };
        int64_t at = 0;
        for (; depth >= BF16_TILE; depth -= BF16_TILE, at += step, right += 2 * BLOCK) {
#pragma GCC unroll 4
            for (int i = 0; i < 16; ++i) add(pair_at(at + NEXT * i), right + 32 * i);
        }
        for (; depth > 1; depth -= 2, at += NEXT, right += 32) add(pair_at(at), right);
        if (depth > 0) add([&](int r) { return int32_t(row[r][at]); }, right);
    }

    void store(float* to) const {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < 2; ++n)
                _mm512_store_ps(to + r * BF16_TILE + n * HALF, n < N ? v[r][n < N ? n : 0] : _mm512_setzero_ps());
    }
};

template <int R, int N>
void multiply_rows(const Bf16TileArgs& a, int64_t first, float* sums) {
    Sums<R, N> sum;
    const int64_t size = (a.depth + BF16_TILE - 1) / BF16_TILE * 2 * BLOCK;
    for (int32_t j = 0; j < a.tap_count; ++j) {
        const int32_t* in = a.in + j * a.in_stride + first;
        const Bf16* row[R];
        for (int r = 0; r < R; ++r) row[r] = a.source + in[r] * a.depth;
        sum.template add_rows<2>(row, BF16_TILE, a.depth, a.panel + a.taps[j] * size);
    }
    sum.store(sums + first * BF16_TILE);
}

template <int R, int N>
void multiply_rows(const Bf16OuterArgs& a, int64_t first, float* sums) {
    Sums<R, N> sum;
    const Bf16* row[R];
    for (int r = 0; r < R; ++r) row[r] = a.p + (first + r) / HALF * BLOCK + (first + r) % HALF * 2;
    sum.template add_rows<BF16_TILE>(row, 2 * BLOCK, a.steps * BF16_TILE, a.q);
    sum.store(sums + first * BF16_TILE);
}

template <int R, class Args>
void multiply_any(const Args& a, int64_t first, int64_t rows, float* sums) {
    if constexpr (R > 1) {
        if (rows < R) return multiply_any<R - 1>(a, first, rows, sums);
    }
    if (a.columns > HALF) multiply_rows<R, 2>(a, first, sums);
    else multiply_rows<R, 1>(a, first, sums);
}

struct PairVectors {
    static constexpr bool GATHERS = false;

    static void begin() {}
    static void end() {}

    template <class Args>
    static void multiply(const Args& a, float* sums) {
        const int64_t parts = (a.rows + ROWS - 1) / ROWS;
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t first = a.rows * part / parts;
            multiply_any<ROWS>(a, first, a.rows * (part + 1) / parts - first, sums);
        }
    }
};

}  // namespace

const Bf16Kernels* kernels_avx512_bf16() {
    static constexpr Bf16Kernels kernels = bf16_table<PairVectors>();
    return &kernels;
}

}  // namespace patchsparse

#else  // built for another processor, or by a compiler without these flags

namespace patchsparse {

const Bf16Kernels* kernels_avx512_bf16() { return nullptr; }

}  // namespace patchsparse

#endif
