// Weight gradient in bfloat16, summed in float32: both sides of a run are gathered with neighbouring pairs interleaved,
// the rows in the order that the instruction set reads.
#include "ops/ops.h"
#include "ops/wgrad.h"
#include "runtime/dispatch.h"

namespace patchsparse {
namespace {

struct TilePolicy {
    using Source = Bf16;
    using Sum = float;
    using Result = Bf16;
    static constexpr int64_t RUN = 512;
    const Bf16Kernels& kernels;

    int64_t tile_rows() const { return BF16_TILE; }
    int64_t tile_columns() const { return BF16_TILE; }
    int64_t left_size() const { return RUN * BF16_TILE; }
    void begin() const { kernels.begin(); }
    void end() const { kernels.end(); }

    void gather_columns(const GatherArgs<Bf16>& args) const { kernels.gather_q(args); }
    bool gather_rows(const GatherArgs<Bf16>& args, int64_t) const {
        kernels.gather_p(args);
        return true;
    }
    void multiply(const Bf16* left, const int64_t*, int64_t count, const Bf16* panel, float* result,
                  int64_t result_stride, int32_t rows, int32_t columns, bool accumulate) const {
        const int64_t steps = (count + BF16_TILE - 1) / BF16_TILE;
        kernels.outer({left, panel, steps, result, result_stride, rows, columns, accumulate});
    }
    void narrow(const float* from, Bf16* to, int64_t count) const { kernels.narrow(from, to, count); }
};

}  // namespace

bool wgrad_bf16(const ps_wgrad_args& args) {
    const Bf16Kernels* table = args.weight_dtype == PS_BF16 ? kernels_bf16(args.isa) : nullptr;
    return table != nullptr && Wgrad<TilePolicy>(args, TilePolicy{*table}).run();
}

}  // namespace patchsparse
