// AVX-512: vectors of 64 bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Avx512Vector {
    using T = float;
    static constexpr int width = 16;
    __m512 v;

    static __mmask16 mask(int count) { return static_cast<__mmask16>((1u << count) - 1); }
    static Avx512Vector load(const T* p) { return {_mm512_loadu_ps(p)}; }
    static Avx512Vector load(const T* p, int count) { return {_mm512_maskz_loadu_ps(mask(count), p)}; }
    static Avx512Vector widen(__m256i bf16) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16))};
    }
    static Avx512Vector load(const uint16_t* p) {
        return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static Avx512Vector load(const uint16_t* p, int count) { return widen(_mm256_maskz_loadu_epi16(mask(count), p)); }
    static Avx512Vector all(T x) { return {_mm512_set1_ps(x)}; }
    static Avx512Vector zero() { return {_mm512_setzero_ps()}; }
    void store(T* p) const { _mm512_storeu_ps(p, v); }
    void store(T* p, int count) const { _mm512_mask_storeu_ps(p, mask(count), v); }
    // Round to the nearest bfloat16, ties to even; NaN stays NaN.
    void store(uint16_t* p, int count) const {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
        _mm256_mask_storeu_epi16(p, mask(count), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
    void add_product(Avx512Vector a, Avx512Vector b) { v = _mm512_fmadd_ps(a.v, b.v, v); }
    void add(Avx512Vector a) { v = _mm512_add_ps(v, a.v); }
    Avx512Vector plus(Avx512Vector a) const { return {_mm512_add_ps(v, a.v)}; }
    Avx512Vector minus(Avx512Vector a) const { return {_mm512_sub_ps(v, a.v)}; }
    Avx512Vector half() const { return {_mm512_mul_ps(v, _mm512_set1_ps(0.5f))}; }

    // Pairs of rows, then of pairs, are interleaved within 128-bit quarters; then the quarters are exchanged twice.
    static void transpose(Avx512Vector* block);
};

inline void Avx512Vector::transpose(Avx512Vector* block) {
    __m512 t[16], u[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(block[i].v, block[i + 1].v);
        t[i + 1] = _mm512_unpackhi_ps(block[i].v, block[i + 1].v);
    }
    for (int i = 0; i < 16; i += 4) {
        u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        block[i].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        block[i + 8].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        block[i + 4].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        block[i + 12].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

}  // namespace
