// bfloat16 on AMX matrix tiles: built with its flags (flags.txt), chosen at run time (runtime/dispatch.cpp).
//
// A tile register holds 16 rows of 64 bytes. One instruction multiplies 16 rows of 32 channels by 32 channels of 16
// columns and adds to 16 x 16 float32 sums; four of them share two loads of either side.
#include "kernels/tables.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include "kernels/simd_avx512.h"

namespace patchsparse {
namespace {

#include "kernels/blocks.inl"

// Add up to 32 x 32 sums, rows of the left side from `left`, columns of the right from `right`.
template <bool TALL, bool WIDE>
inline void add_steps(const Bf16* left, const Bf16* right, int64_t steps) {
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
void add_products(const Bf16TileArgs& a) {
    const int64_t steps = (a.depth + BF16_TILE - 1) / BF16_TILE, size = steps * 2 * BLOCK;
    for (int32_t j = 0; j < a.tap_count; ++j)
        add_steps<TALL, WIDE>(a.blocks + j * size, a.panel + a.taps[j] * size, steps);
}

template <bool TALL, bool WIDE>
void add_products(const Bf16OuterArgs& a) {
    add_steps<TALL, WIDE>(a.p, a.q, a.steps);
}

struct MatrixTiles {
    static constexpr bool GATHERS = true;

    static void begin() {
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

    static void end() { _tile_release(); }

    template <class Args>
    static void multiply(const Args& a, float* sums) {
        constexpr int64_t PITCH = BF16_TILE * sizeof(float);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        const bool tall = a.rows > HALF, wide = a.columns > HALF;
        if (tall) wide ? add_products<true, true>(a) : add_products<true, false>(a);
        else wide ? add_products<false, true>(a) : add_products<false, false>(a);
        _tile_stored(0, sums, PITCH);
        _tile_stored(1, sums + HALF, PITCH);
        _tile_stored(2, sums + HALF * BF16_TILE, PITCH);
        _tile_stored(3, sums + HALF * BF16_TILE + HALF, PITCH);
    }
};

}  // namespace

const Bf16Kernels* kernels_amx() {
    static constexpr Bf16Kernels kernels = bf16_table<MatrixTiles>();
    return &kernels;
}

}  // namespace patchsparse

#else  // built for another processor, or by a compiler without these flags

namespace patchsparse {

const Bf16Kernels* kernels_amx() { return nullptr; }

}  // namespace patchsparse

#endif
