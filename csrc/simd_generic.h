// A vector of 16 bytes in the compiler's own extension: SSE2, NEON or plain code, whatever the target has.
#pragma once

#include <cstdint>

namespace {

template <class Scalar>
struct GenericVector {
    using T = Scalar;
    static constexpr int width = 16 / sizeof(T);
    typedef T Raw __attribute__((vector_size(16)));
    Raw v;

    static GenericVector load(const T* p) {
        GenericVector r;
        __builtin_memcpy(&r.v, p, 16);
        return r;
    }
    static GenericVector load(const T* p, int count) {
        GenericVector r{};
        for (int i = 0; i < count; ++i) r.v[i] = p[i];
        return r;
    }
    static GenericVector all(T x) { return {Raw{} + x}; }
    static GenericVector zero() { return {Raw{}}; }
    void store(T* p) const { __builtin_memcpy(p, &v, 16); }
    void store(T* p, int count) const {
        for (int i = 0; i < count; ++i) p[i] = v[i];
    }
    void add_product(GenericVector a, GenericVector b) { v += a.v * b.v; }
    void add(GenericVector a) { v += a.v; }
};

}  // namespace
