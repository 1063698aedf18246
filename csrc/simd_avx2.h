// AVX2 + FMA: vectors of 32 bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "bf16.h"

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
    static Avx2Vector all(T x) { return {_mm256_set1_ps(x)}; }
    static Avx2Vector zero() { return {_mm256_setzero_ps()}; }
    void store(T* p) const { _mm256_storeu_ps(p, v); }
    void store(T* p, int count) const { _mm256_maskstore_ps(p, mask(count), v); }
    static Avx2Vector load(const uint16_t* p) { return load(p, width); }
    static Avx2Vector load(const uint16_t* p, int count) { return load_bf16<Avx2Vector>(p, count); }
    void store(uint16_t* p, int count) const { store_bf16(*this, p, count); }
    void add_product(Avx2Vector a, Avx2Vector b) { v = _mm256_fmadd_ps(a.v, b.v, v); }
    void add(Avx2Vector a) { v = _mm256_add_ps(v, a.v); }
    Avx2Vector plus(Avx2Vector a) const { return {_mm256_add_ps(v, a.v)}; }
    Avx2Vector minus(Avx2Vector a) const { return {_mm256_sub_ps(v, a.v)}; }
    Avx2Vector half() const { return {_mm256_mul_ps(v, _mm256_set1_ps(0.5f))}; }
    static void transpose(Avx2Vector* block) {
        T cells[width][width], turned[width][width];
        for (int i = 0; i < width; ++i) block[i].store(cells[i]);
        for (int i = 0; i < width; ++i)
            for (int j = 0; j < width; ++j) turned[i][j] = cells[j][i];
        for (int i = 0; i < width; ++i) block[i] = load(turned[i]);
    }
};

}  // namespace
