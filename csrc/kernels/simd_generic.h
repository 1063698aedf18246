// A vector of 16 bytes in the compiler's own extension: SSE2, NEON or plain code, whatever the target has.
#pragma once

#include <cstdint>

#include "kernels/bf16.h"

namespace {

template <class Scalar>
struct GenericVector {
    using T = Scalar;
    static constexpr int width = 16 / sizeof(T);
    typedef T Raw __attribute__((vector_size(16)));
    typedef uint32_t Bits __attribute__((vector_size(16)));
    typedef uint16_t Half __attribute__((vector_size(8)));
    // float32: whole vectors of bfloat16 are widened and rounded at once.
    static constexpr bool SINGLE = sizeof(T) == sizeof(uint32_t);
    Raw v;

    static GenericVector load(const T* p) {
        GenericVector r;
        __builtin_memcpy(&r.v, p, 16);
        return r;
    }
    static GenericVector load(const T* p, int count) {
        T cells[width] = {};
        for (int i = 0; i < count; ++i) cells[i] = p[i];
        return load(cells);
    }
    static GenericVector all(T x) { return {Raw{} + x}; }
    static GenericVector zero() { return {Raw{}}; }
    void store(T* p) const { __builtin_memcpy(p, &v, 16); }
    void store(T* p, int count) const {
        T cells[width];
        store(cells);
        for (int i = 0; i < count; ++i) p[i] = cells[i];
    }
    static GenericVector load(const uint16_t* p) {
        if constexpr (!SINGLE) return load_bf16<GenericVector>(p, width);
        Half upper;
        __builtin_memcpy(&upper, p, sizeof upper);
        return {(Raw)(__builtin_convertvector(upper, Bits) << 16)};
    }
    static GenericVector load(const uint16_t* p, int count) {
        return count == width ? load(p) : load_bf16<GenericVector>(p, count);
    }
    void store(uint16_t* p, int count) const {
        if (!SINGLE || count < width) return store_bf16(*this, p, count);
        const Bits bits = (Bits)v, number = (Bits)(v == v), rounded = bits + 0x7fff + (bits >> 16 & 1);
        const Half upper = __builtin_convertvector(((rounded & number) | (0x7fc00000 & ~number)) >> 16, Half);
        __builtin_memcpy(p, &upper, sizeof upper);
    }
    void add_product(GenericVector a, GenericVector b) { v += a.v * b.v; }
    void add(GenericVector a) { v += a.v; }
    GenericVector plus(GenericVector a) const { return {v + a.v}; }
    GenericVector minus(GenericVector a) const { return {v - a.v}; }
    GenericVector half() const { return {v * T(0.5)}; }
    static void transpose(GenericVector* block) {
        T cells[width][width], turned[width][width];
        for (int i = 0; i < width; ++i) block[i].store(cells[i]);
        for (int i = 0; i < width; ++i)
            for (int j = 0; j < width; ++j) turned[i][j] = cells[j][i];
        for (int i = 0; i < width; ++i) block[i] = load(turned[i]);
    }
};

}  // namespace
