// bfloat16 as the upper half of a float32.
#pragma once

#include <cstdint>

namespace patchsparse {

using Bf16 = uint16_t;

}  // namespace patchsparse

namespace {

inline float from_bf16(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

// Round to the nearest, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Load and store `count` elements, for a vector type without an instruction for it; the rest of a loaded vector is 0.
template <class V>
V load_bf16(const uint16_t* p, int count) {
    typename V::T cells[V::width] = {};
    for (int i = 0; i < count; ++i) cells[i] = from_bf16(p[i]);
    return V::load(cells);
}

template <class V>
void store_bf16(const V& vector, uint16_t* p, int count) {
    typename V::T cells[V::width];
    vector.store(cells);
    for (int i = 0; i < count; ++i) p[i] = to_bf16(float(cells[i]));
}

}  // namespace
