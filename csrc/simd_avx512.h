// AVX-512: vectors of 64 bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

template <class Scalar>
struct Avx512Vector;

template <>
struct Avx512Vector<float> {
    using T = float;
    static constexpr int width = 16;
    __m512 v;

    static __mmask16 mask(int count) { return static_cast<__mmask16>((1u << count) - 1); }
    static Avx512Vector load(const T* p) { return {_mm512_loadu_ps(p)}; }
    static Avx512Vector load(const T* p, int count) { return {_mm512_maskz_loadu_ps(mask(count), p)}; }
    static Avx512Vector all(T x) { return {_mm512_set1_ps(x)}; }
    static Avx512Vector zero() { return {_mm512_setzero_ps()}; }
    void store(T* p) const { _mm512_storeu_ps(p, v); }
    void store(T* p, int count) const { _mm512_mask_storeu_ps(p, mask(count), v); }
    void add_product(Avx512Vector a, Avx512Vector b) { v = _mm512_fmadd_ps(a.v, b.v, v); }
    void add(Avx512Vector a) { v = _mm512_add_ps(v, a.v); }
};

template <>
struct Avx512Vector<double> {
    using T = double;
    static constexpr int width = 8;
    __m512d v;

    static __mmask8 mask(int count) { return static_cast<__mmask8>((1u << count) - 1); }
    static Avx512Vector load(const T* p) { return {_mm512_loadu_pd(p)}; }
    static Avx512Vector load(const T* p, int count) { return {_mm512_maskz_loadu_pd(mask(count), p)}; }
    static Avx512Vector all(T x) { return {_mm512_set1_pd(x)}; }
    static Avx512Vector zero() { return {_mm512_setzero_pd()}; }
    void store(T* p) const { _mm512_storeu_pd(p, v); }
    void store(T* p, int count) const { _mm512_mask_storeu_pd(p, mask(count), v); }
    void add_product(Avx512Vector a, Avx512Vector b) { v = _mm512_fmadd_pd(a.v, b.v, v); }
    void add(Avx512Vector a) { v = _mm512_add_pd(v, a.v); }
};

}  // namespace
