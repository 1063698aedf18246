// bfloat16 on AMX matrix tiles; built with its own compiler flags (setup.py), chosen at run time (dispatch.cpp).
//
// A tile register holds 16 rows of 64 bytes. One instruction multiplies 16 rows of 32 channels by 32 channels of 16
// columns and adds to 16 x 16 float32 sums; four of them share two loads of either side.
#include "kernels.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include "simd_avx512.h"

namespace patchsparse {
namespace {

constexpr int64_t HALF = 16, BLOCK = 512;  // rows of a tile register; its elements

inline int clamp(int64_t a, int64_t most) { return static_cast<int>(a < 0 ? 0 : a < most ? a : most); }

inline __m512i load(const Bf16* p, int count) {
    return _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << count) - 1, p);
}

void begin() {
    alignas(64) struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config{};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
        config.bytes[i] = 64;
        config.rows[i] = 16;
    }
    asm volatile("" : : "r"(&config) : "memory");  // compilers think that the next line reads 8 bytes only
    _tile_loadconfig(&config);
}

void end() { _tile_release(); }

// Exchange rows and columns of 16 x 16 pairs of bfloat16.
inline void transpose(__m512i* rows) {
    Avx512Vector block[16];
    for (int i = 0; i < 16; ++i) block[i].v = _mm512_castsi512_ps(rows[i]);
    Avx512Vector::transpose(block);
    for (int i = 0; i < 16; ++i) rows[i] = _mm512_castps_si512(block[i].v);
}

// (a0, b0, a1, b1, ...) of two rows of 16.
inline __m512i interleave(__m256i a, __m256i b) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}

inline __m256i load_half(const Bf16* p, int count) {
    return _mm256_maskz_loadu_epi16(static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1), p);
}

void pack(const Bf16PackArgs& a) {
    Bf16* to = a.panel;
    for (int64_t k = 0; k < a.depth; k += BF16_TILE)
        for (int64_t n = 0; n < BF16_TILE; n += HALF, to += BLOCK) {
            const Bf16* from = a.weight + n * a.stride[0] + k * a.stride[1];
            const int columns = clamp(a.columns - n, HALF), depth = clamp(a.depth - k, BF16_TILE);
            __m512i rows[16];
            if (a.stride[1] == 1) {
                for (int i = 0; i < 16; ++i) rows[i] = i < columns ? load(from + i * a.stride[0], depth) : _mm512_setzero_si512();
                transpose(rows);
            } else if (a.stride[0] == 1) {
                for (int i = 0; i < 16; ++i) {
                    const Bf16* row = from + 2 * i * a.stride[1];
                    rows[i] = interleave(load_half(row, 2 * i < depth ? columns : 0),
                                         load_half(row + a.stride[1], 2 * i + 1 < depth ? columns : 0));
                }
            } else {
                alignas(64) Bf16 cells[16][32] = {};
                for (int i = 0; i < depth; ++i)
                    for (int j = 0; j < columns; ++j)
                        cells[i / 2][2 * j + i % 2] = from[j * a.stride[0] + i * a.stride[1]];
                for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(cells[i]);
            }
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 32, rows[i]);
        }
}

void gather(const GatherArgs<Bf16>& a) {
    for (int64_t r = 0; r < a.count; ++r) {
        const Bf16* from = a.source + a.at[r] * a.stride;
        Bf16* to = a.out + r * BF16_TILE;
        int64_t k = 0;
        for (; k + BF16_TILE <= a.columns; k += BF16_TILE, to += 2 * BLOCK) _mm512_storeu_si512(to, _mm512_loadu_si512(from + k));
        if (k < a.columns) _mm512_storeu_si512(to, load(from + k, static_cast<int>(a.columns - k)));
    }
}

// Add up to 32 x 32 sums, rows of the left side from `left`, columns of the right from `right`.
template <bool TALL, bool WIDE>
inline void multiply(const Bf16* left, const Bf16* right, int64_t steps) {
    for (int64_t s = 0; s < steps; ++s, left += 2 * BLOCK, right += 2 * BLOCK) {
        _tile_loadd(4, left, 64);
        _tile_loadd(6, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (WIDE) {
            _tile_loadd(7, right + BLOCK, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (TALL) {
            _tile_loadd(5, left + BLOCK, 64);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (WIDE) _tile_dpbf16ps(3, 5, 7);
        }
    }
}

template <bool TALL, bool WIDE>
void sum_taps(const Bf16TileArgs& a) {
    for (int32_t j = 0; j < a.tap_count; ++j)
        multiply<TALL, WIDE>(a.blocks + j * a.steps * 2 * BLOCK, a.panel + a.taps[j] * a.steps * 2 * BLOCK, a.steps);
}

inline void zero_tiles() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

inline void store_tiles(float* sums) {
    constexpr int64_t PITCH = BF16_TILE * sizeof(float);
    _tile_stored(0, sums, PITCH);
    _tile_stored(1, sums + HALF, PITCH);
    _tile_stored(2, sums + HALF * BF16_TILE, PITCH);
    _tile_stored(3, sums + HALF * BF16_TILE + HALF, PITCH);
}

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

inline void add_rows(const float* sums, float* to, int columns) {
    for (int n = 0; n < columns; n += 16) {
        const __mmask16 mask = Avx512Vector::mask(clamp(columns - n, 16));
        const __m512 old = _mm512_maskz_loadu_ps(mask, to + n);
        _mm512_mask_storeu_ps(to + n, mask, _mm512_add_ps(old, _mm512_load_ps(sums + n)));
    }
}

void tile(const Bf16TileArgs& a) {
    alignas(64) float sums[BF16_TILE * BF16_TILE];
    zero_tiles();
    const bool tall = a.rows > HALF, wide = a.columns > HALF;
    if (tall) wide ? sum_taps<true, true>(a) : sum_taps<true, false>(a);
    else wide ? sum_taps<false, true>(a) : sum_taps<false, false>(a);
    store_tiles(sums);
    if (a.sum != nullptr) {
        for (int32_t r = 0; r < a.rows; ++r) add_rows(sums + r * BF16_TILE, a.sum + a.out[r] * a.target_stride, a.columns);
        return;
    }
    __m512 low = _mm512_setzero_ps(), high = low;
    if (a.bias != nullptr) {
        low = widen(load_half(a.bias, a.columns));
        high = widen(load_half(a.bias + HALF, clamp(a.columns - HALF, HALF)));
    }
    const __mmask32 mask = a.columns >= 32 ? ~0u : (1u << a.columns) - 1;
    for (int32_t r = 0; r < a.rows; ++r) {
        const float* row = sums + r * BF16_TILE;
        const __m512bh packed =
            _mm512_cvtne2ps_pbh(_mm512_add_ps(_mm512_load_ps(row + HALF), high), _mm512_add_ps(_mm512_load_ps(row), low));
        _mm512_mask_storeu_epi16(a.target + a.out[r] * a.target_stride, mask, (__m512i)packed);
    }
}

// Rows of pairs 2i and 2i + 1, columns [c, c + 16), interleaved.
inline void pair_rows(const GatherArgs<Bf16>& a, int64_t first, int64_t c, __m512i* rows) {
    const int columns = clamp(a.columns - c, HALF);
    for (int64_t i = 0; i < 16; ++i) {
        const int64_t p = first + 2 * i;
        const __m256i even = p < a.count ? load_half(a.source + a.at[p] * a.stride + c, columns) : _mm256_setzero_si256();
        const __m256i odd = p + 1 < a.count ? load_half(a.source + a.at[p + 1] * a.stride + c, columns) : _mm256_setzero_si256();
        rows[i] = interleave(even, odd);
    }
}

template <bool TRANSPOSED>
void gather_pairs(const GatherArgs<Bf16>& a) {
    Bf16* to = a.out;
    for (int64_t first = 0; first < a.count; first += BF16_TILE)
        for (int64_t c = 0; c < BF16_TILE; c += HALF, to += BLOCK) {
            __m512i rows[16];
            pair_rows(a, first, c, rows);
            if (TRANSPOSED) transpose(rows);
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 32, rows[i]);
        }
}

void outer(const Bf16OuterArgs& a) {
    alignas(64) float sums[BF16_TILE * BF16_TILE];
    zero_tiles();
    const bool tall = a.rows > HALF, wide = a.columns > HALF;
    if (tall) wide ? multiply<true, true>(a.p, a.q, a.steps) : multiply<true, false>(a.p, a.q, a.steps);
    else wide ? multiply<false, true>(a.p, a.q, a.steps) : multiply<false, false>(a.p, a.q, a.steps);
    store_tiles(sums);
    for (int32_t r = 0; r < a.rows; ++r) {
        float* to = a.result + r * a.result_stride;
        if (a.accumulate) {
            add_rows(sums + r * BF16_TILE, to, a.columns);
        } else {
            for (int n = 0; n < a.columns; n += 16)
                _mm512_mask_storeu_ps(to + n, Avx512Vector::mask(clamp(a.columns - n, 16)), _mm512_load_ps(sums + r * BF16_TILE + n));
        }
    }
}

void narrow(const float* from, Bf16* to, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 mask = Avx512Vector::mask(clamp(count - i, 16));
        const __m256bh packed = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from + i));
        _mm256_mask_storeu_epi16(to + i, mask, (__m256i)packed);
    }
}

}  // namespace

const Bf16Kernels* kernels_amx() {
    static constexpr Bf16Kernels kernels{begin, end, pack, gather, tile, gather_pairs<true>, gather_pairs<false>, outer, narrow};
    return &kernels;
}

}  // namespace patchsparse

#else  // built for another processor, or by a compiler without these flags

namespace patchsparse {

const Bf16Kernels* kernels_amx() { return nullptr; }

}  // namespace patchsparse

#endif
