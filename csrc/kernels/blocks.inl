// bfloat16 blocks of 32 x 32, for any Unit that multiplies them: packing, gathering, storing. Included once per
// instruction set, inside a namespace, after simd_avx512.h.
//
// Both sides hold their depth (channels, or rows that are summed over) in pairs. A left block has 32 rows of 32; a
// right one has two halves of 16 columns, each (16 pairs, 16 columns, 2).

constexpr int64_t HALF = 16, BLOCK = 512;  // rows or columns of half a block; elements of half a block

inline int clamp(int64_t a, int64_t most) { return static_cast<int>(a < 0 ? 0 : a < most ? a : most); }

inline __m512i load_row(const Bf16* p, int count) {
    return _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << count) - 1, p);
}

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

constexpr int64_t AHEAD = 32;  // rows that are asked for before they are read

void pack(const Bf16PackArgs& a) {
    Bf16* to = a.panel;
    for (int64_t k = 0; k < a.depth; k += BF16_TILE)
        for (int64_t n = 0; n < BF16_TILE; n += HALF, to += BLOCK) {
            const Bf16* from = a.weight + n * a.stride[0] + k * a.stride[1];
            const int columns = clamp(a.columns - n, HALF), depth = clamp(a.depth - k, BF16_TILE);
            __m512i rows[16];
            if (a.stride[1] == 1) {
                for (int i = 0; i < 16; ++i) {
                    __builtin_prefetch(from + i * a.stride[0] + 4 * BF16_TILE);
                    rows[i] = i < columns ? load_row(from + i * a.stride[0], depth) : _mm512_setzero_si512();
                }
                transpose(rows);
            } else if (a.stride[0] == 1) {
                for (int i = 0; i < 16; ++i) {
                    const Bf16* row = from + 2 * i * a.stride[1];
                    __builtin_prefetch(row + AHEAD * a.stride[1]);
                    __builtin_prefetch(row + (AHEAD + 1) * a.stride[1]);
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
        for (; k + BF16_TILE <= a.columns; k += BF16_TILE, to += 2 * BLOCK)
            _mm512_storeu_si512(to, _mm512_loadu_si512(from + k));
        if (k < a.columns) _mm512_storeu_si512(to, load_row(from + k, static_cast<int>(a.columns - k)));
    }
}

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

inline void add_rows(const float* sums, float* to, int columns) {
    for (int n = 0; n < columns; n += 16) {
        const __mmask16 mask = Avx512Vector::mask(clamp(columns - n, 16));
        const __m512 old = _mm512_maskz_loadu_ps(mask, to + n);
        _mm512_mask_storeu_ps(to + n, mask, _mm512_add_ps(old, _mm512_load_ps(sums + n)));
    }
}

template <class Unit>
void tile(const Bf16TileArgs& a) {
    alignas(64) float sums[BF16_TILE * BF16_TILE];
    Unit::multiply(a, sums);
    if (a.sum != nullptr) {
        for (int32_t r = 0; r < a.rows; ++r)
            add_rows(sums + r * BF16_TILE, a.sum + a.out[r] * a.target_stride, a.columns);
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
        const __m512 left = _mm512_add_ps(_mm512_load_ps(row), low);
        const __m512 right = _mm512_add_ps(_mm512_load_ps(row + HALF), high);
        const __m512bh packed = _mm512_cvtne2ps_pbh(right, left);
        _mm512_mask_storeu_epi16(a.target + a.out[r] * a.target_stride, mask, (__m512i)packed);
    }
}

// Pairs of rows, 32 columns of each: (steps, 2, 16 pairs, 16 columns, 2); transposed (steps, 32 columns, 16 pairs, 2).
template <bool TRANSPOSED>
void gather_pairs(const GatherArgs<Bf16>& a) {
    alignas(64) static constexpr uint16_t LOW[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(LOW), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    auto row = [&](int64_t i) {
        return i < a.count ? load_row(a.source + a.at[i] * a.stride, a.columns) : _mm512_setzero_si512();
    };
    Bf16* to = a.out;
    for (int64_t first = 0; first < a.count; first += BF16_TILE, to += 2 * BLOCK) {
        for (int i = 0; i < 16; ++i) {
            for (int64_t ahead = first + 2 * i + AHEAD; ahead < a.count && ahead < first + 2 * i + AHEAD + 2; ++ahead)
                __builtin_prefetch(a.source + a.at[ahead] * a.stride);
            const __m512i even = row(first + 2 * i), odd = row(first + 2 * i + 1);
            _mm512_store_si512(to + i * 32, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_store_si512(to + BLOCK + i * 32, _mm512_permutex2var_epi16(even, high, odd));
        }
        for (Bf16* half = to; TRANSPOSED && half < to + 2 * BLOCK; half += BLOCK) {
            __m512i rows[16];
            for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(half + i * 32);
            transpose(rows);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(half + i * 32, rows[i]);
        }
    }
}

template <class Unit>
void outer(const Bf16OuterArgs& a) {
    alignas(64) float sums[BF16_TILE * BF16_TILE];
    Unit::multiply(a, sums);
    for (int32_t r = 0; r < a.rows; ++r) {
        float* to = a.result + r * a.result_stride;
        if (a.accumulate) {
            add_rows(sums + r * BF16_TILE, to, a.columns);
        } else {
            for (int n = 0; n < a.columns; n += 16) {
                const __mmask16 mask = Avx512Vector::mask(clamp(a.columns - n, 16));
                _mm512_mask_storeu_ps(to + n, mask, _mm512_load_ps(sums + r * BF16_TILE + n));
            }
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

template <class Unit>
constexpr Bf16Kernels bf16_table() {
    return {Unit::begin,
            Unit::end,
            pack,
            Unit::GATHERS ? gather : nullptr,
            tile<Unit>,
            gather_pairs<Unit::GATHERS>,
            gather_pairs<false>,
            outer<Unit>,
            narrow};
}
