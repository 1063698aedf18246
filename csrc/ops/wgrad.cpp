// Weight gradient with vectors: columns are gathered into panels, rows are broadcast from where they lie or a copy.
#include "ops/wgrad.h"

#include "ops/ops.h"
#include "runtime/dispatch.h"
#include "runtime/storage.h"

namespace patchsparse {
namespace {

// `R` is what the gradient is stored as: T or bfloat16.
template <class T, class R>
struct VectorPolicy {
    using Source = T;
    using Sum = T;
    using Result = R;
    static constexpr int64_t RUN = 256;
    const Kernels<T>& kernels;

    int64_t tile_rows() const { return kernels.outer_rows; }
    int64_t tile_columns() const { return kernels.columns; }
    int64_t left_size() const { return RUN * kernels.columns / 2; }
    void begin() const {}
    void end() const {}

    void gather_columns(const GatherArgs<T>& args) const { kernels.gather(args); }
    // Rows whose distance is a power of two fall on few lines of the first-level cache: worth a copy for many panels.
    bool gather_rows(const GatherArgs<T>& args, int64_t panels) const {
        if (panels <= 4) return false;
        kernels.gather_left(args);
        return true;
    }
    void multiply(const T* p, const int64_t* offsets, int64_t count, const T* panel, T* result, int64_t result_stride,
                  int32_t rows, int32_t columns, bool accumulate) const {
        kernels.outer({p, offsets, count, panel, result, result_stride, rows, columns, accumulate});
    }
    void narrow(const T* from, Bf16* to, int64_t count) const { kernels.narrow(from, to, count); }
};

template <class T>
bool wgrad_as(const ps_wgrad_args& args) {
    const Kernels<T>* table = Storage<T>::offers(args.weight_dtype) ? kernels<T>(args.isa) : nullptr;
    if (table == nullptr) return false;
    if (args.weight_dtype == PS_BF16) return Wgrad<VectorPolicy<T, Bf16>>(args, {*table}).run();
    return Wgrad<VectorPolicy<T, T>>(args, {*table}).run();
}

}  // namespace

bool wgrad(const ps_wgrad_args& args) {
    if (args.dtype == PS_F32) return wgrad_as<float>(args);
    return args.dtype == PS_F64 && wgrad_as<double>(args);
}

}  // namespace patchsparse
