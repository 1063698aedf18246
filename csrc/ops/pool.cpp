// Max-pooling by taps: an inactive neighbour counts as 0, the outside of the image not at all.
#include <algorithm>
#include <limits>

#include "ops/ops.h"
#include "plan/plan.h"
#include "runtime/dispatch.h"
#include "runtime/threads.h"

namespace patchsparse {
namespace {

// Call f(target row, tap, source row or INACTIVE or OUTSIDE) for every target of a patch, taps in order.
template <class Begin, class F>
void for_taps(const ps_plan& plan, int64_t patch, Begin begin, F f) {
    const Axis &v = plan.axis[0], &h = plan.axis[1];
    const int32_t* halo = plan.halo_of(patch);
    for (int32_t y = 0; y < v.target; ++y)
        for (int32_t x = 0; x < h.target; ++x) {
            const int64_t target = (patch * v.target + y) * h.target + x;
            begin(target);
            for (int32_t tap = 0; tap < plan.taps(); ++tap) {
                const int32_t hy = v.at[size_t(y) * v.taps + tap / h.taps];
                const int32_t hx = h.at[size_t(x) * h.taps + tap % h.taps];
                f(target, tap, hy < 0 || hx < 0 ? OUTSIDE : halo[int64_t(hy) * h.halo + hx]);
            }
        }
}

template <class T>
void forward(const ps_pool_args& args, const Kernels<T>& kernels) {
    const int64_t channels = args.channels;
    const T* source = static_cast<const T*>(args.source);
    T* target = static_cast<T*>(args.target);
    parallel_for(args.threads, args.plan->geometry.patches, [&](int64_t patch) {
        bool opened = false;
        auto begin = [&](int64_t row) {  // a stencil of gaps may lie around the image as a whole
            opened = false;
            std::fill(target + row * channels, target + (row + 1) * channels, -std::numeric_limits<T>::infinity());
            std::fill(args.tap + row * channels, args.tap + (row + 1) * channels, uint8_t(0));
        };
        for_taps(*args.plan, patch, begin, [&](int64_t row, int32_t tap, int32_t from) {
            if (from == OUTSIDE) return;
            T* best = target + row * channels;
            uint8_t* at = args.tap + row * channels;
            if (!opened) {
                std::fill(at, at + channels, static_cast<uint8_t>(tap));
                opened = true;
            }
            kernels.pool_max(from < 0 ? nullptr : source + from * channels, tap, best, at, channels);
        });
    });
}

template <class T>
void backward(const ps_pool_args& args, const Kernels<T>& kernels) {
    const int64_t channels = args.channels;
    const T* gradient = static_cast<const T*>(args.source);
    T* target = static_cast<T*>(args.target);
    parallel_for(args.threads, args.plan->geometry.patches, [&](int64_t patch) {
        auto begin = [&](int64_t row) { std::fill(target + row * channels, target + (row + 1) * channels, T(0)); };
        for_taps(*args.plan, patch, begin, [&](int64_t row, int32_t tap, int32_t from) {
            if (from >= 0)
                kernels.pool_add(gradient + from * channels, args.tap + from * channels, tap, target + row * channels,
                                 channels);
        });
    });
}

template <class T>
bool run(const ps_pool_args& args, bool gradient) {
    const Kernels<T>* table = kernels<T>(args.isa);
    if (table == nullptr) return false;
    if (gradient) backward(args, *table);
    else forward(args, *table);
    return true;
}

bool run(const ps_pool_args& args, bool gradient) {
    if (args.dtype == PS_F32) return run<float>(args, gradient);
    return args.dtype == PS_F64 && run<double>(args, gradient);
}

}  // namespace

bool max_pool(const ps_pool_args& args) { return run(args, false); }

bool max_pool_grad(const ps_pool_args& args) { return run(args, true); }

}  // namespace patchsparse
