// How the images and weights of a dtype are stored: in the type of their sums, or as bfloat16.
#pragma once

#include <type_traits>

#include "engine.h"
#include "kernels/tables.h"

namespace patchsparse {

// What reads and writes images or weights of `dtype`, whose sums are T, and where their elements lie.
template <class T>
struct Storage {
    Storage(const Kernels<T>& table, int32_t dtype)
        : kernels(dtype == PS_BF16 ? table.bf16 : table.own), bytes(dtype == PS_BF16 ? sizeof(Bf16) : sizeof(T)) {}

    static bool offers(int32_t dtype) {
        return dtype == PS_BF16 || dtype == (std::is_same_v<T, double> ? PS_F64 : PS_F32);
    }

    const void* at(const void* first, int64_t element) const {
        return static_cast<const char*>(first) + element * bytes;
    }
    void* at(void* first, int64_t element) const { return static_cast<char*>(first) + element * bytes; }

    const StoredKernels<T>& kernels;
    const int64_t bytes;  // of an element
};

}  // namespace patchsparse
