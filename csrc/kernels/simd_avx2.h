// AVX2 + FMA: vectors of 32 bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Avx2Vector {
    using T = float;
    static constexpr int width = 8;
    __m256 v;

    static __m256i mask(int count) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static Avx2Vector load(const T* p) { return {_mm256_loadu_ps(p)}; }
    static Avx2Vector load(const T* p, int count) { return {_mm256_maskload_ps(p, mask(count))}; }
    static Avx2Vector widen(__m128i bf16) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16))};
    }
    static Avx2Vector load(const uint16_t* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    // There is no mask for 16 bits: whole pairs are loaded under one, and the last of an odd number by itself.
    static Avx2Vector load(const uint16_t* p, int count) {
        if (count == width) return load(p);
        const __m128i whole = _mm_cmpgt_epi32(_mm_set1_epi32(count / 2), _mm_setr_epi32(0, 1, 2, 3));
        const __m128i pairs = _mm_maskload_epi32(reinterpret_cast<const int*>(p), whole);
        if (count % 2 == 0) return widen(pairs);
        const __m128i at = _mm_cmpeq_epi16(_mm_set1_epi16(int16_t(count - 1)), _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7));
        return widen(_mm_or_si128(pairs, _mm_and_si128(at, _mm_set1_epi16(int16_t(p[count - 1])))));
    }
    static Avx2Vector all(T x) { return {_mm256_set1_ps(x)}; }
    static Avx2Vector zero() { return {_mm256_setzero_ps()}; }
    void store(T* p) const { _mm256_storeu_ps(p, v); }
    // A masked store takes AMD processors dozens of cycles: whole vectors, nearly all, go without.
    void store(T* p, int count) const {
        if (count == width) store(p);
        else _mm256_maskstore_ps(p, mask(count), v);
    }
    // Round to the nearest bfloat16, ties to even; NaN stays NaN.
    void store(uint16_t* p, int count) const {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
        const __m256 number = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(number), 16);
        const __m128i bf16 = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
        if (count == width) _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bf16);
        else std::memcpy(p, &bf16, size_t(count) * sizeof *p);
    }
    void add_product(Avx2Vector a, Avx2Vector b) { v = _mm256_fmadd_ps(a.v, b.v, v); }
    void add(Avx2Vector a) { v = _mm256_add_ps(v, a.v); }
    Avx2Vector plus(Avx2Vector a) const { return {_mm256_add_ps(v, a.v)}; }
    Avx2Vector minus(Avx2Vector a) const { return {_mm256_sub_ps(v, a.v)}; }
    Avx2Vector half() const { return {_mm256_mul_ps(v, _mm256_set1_ps(0.5f))}; }

    // Pairs of rows, then of pairs, are interleaved within halves; then the halves are exchanged.
    static void transpose(Avx2Vector* block);
};

inline void Avx2Vector::transpose(Avx2Vector* block) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(block[i].v, block[i + 1].v);
        t[i + 1] = _mm256_unpackhi_ps(block[i].v, block[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        block[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        block[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

}  // namespace
