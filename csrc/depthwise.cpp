// Depthwise convolution: by rows of a patch where stride and dilation are 1 and rows are long enough, else by pixel.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "plan.h"

namespace patchsparse {
namespace {

template <class T>
class Depthwise {
  public:
    Depthwise(const ps_depthwise_args& args, const Kernels<T>& kernels)
        : args_(args), plan_(*args.plan), kernels_(kernels), v_(plan_.axis[0]), h_(plan_.axis[1]) {
        const ps_geometry& g = plan_.geometry;
        const bool plain = !g.adjoint && g.stride[0] == 1 && g.stride[1] == 1 && g.dilation[0] == 1 && g.dilation[1] == 1;
        by_rows_ = kernels.depthwise_row != nullptr && plain && h_.target >= 4 &&
                   (h_.taps == 3 || h_.taps == 5 || h_.taps == 7);
    }

    void forward() const {
        parallel_for(args_.threads, plan_.geometry.patches, [this](int64_t patch) {
            for (int32_t y = 0; y < v_.target; ++y) {
                if (by_rows_) kernels_.depthwise_row(row_args(patch, y));
                else for_pixels(patch, y, [this](const PixelArgs<T>& a) { kernels_.depthwise_pixel(a); });
            }
        });
    }

    // A thread owns a range of channels and adds over all patches in order: the same for any number of threads.
    void wgrad() const {
        constexpr int64_t STEP = 64 / sizeof(T);
        const int64_t steps = (args_.channels + STEP - 1) / STEP;
        T* gradient = static_cast<T*>(const_cast<void*>(args_.weight));
        auto share = [&](int thread, int team) {
            const int64_t first = std::min(args_.channels, steps * thread / team * STEP);
            const int64_t last = std::min(args_.channels, steps * (thread + 1) / team * STEP);
            for (int32_t tap = 0; tap < plan_.taps(); ++tap)
                std::fill(gradient + tap * args_.channels + first, gradient + tap * args_.channels + last, T(0));
            for (int64_t patch = 0; first < last && patch < plan_.geometry.patches; ++patch)
                for (int32_t y = 0; y < v_.target; ++y) {
                    if (by_rows_) {
                        kernels_.depthwise_row_wgrad(row_args(patch, y), gradient, first, last);
                        continue;
                    }
                    for_pixels(patch, y, [&](const PixelArgs<T>& a) {
                        kernels_.depthwise_pixel_wgrad(a, gradient, first, last);
                    });
                }
        };
        parallel(args_.threads, share);
    }

  private:
    T* target_row(int64_t patch, int32_t y, int32_t x) const {
        return static_cast<T*>(args_.target) + ((patch * v_.target + y) * h_.target + x) * args_.channels;
    }

    DepthwiseArgs<T> row_args(int64_t patch, int32_t y) const {
        return {static_cast<const T*>(args_.source), plan_.halo_of(patch) + int64_t(v_.at[size_t(y) * v_.taps]) * h_.halo,
                h_.halo, {v_.taps, h_.taps}, static_cast<const T*>(args_.weight), static_cast<const T*>(args_.bias),
                target_row(patch, y, 0), args_.channels, h_.target, args_.flip != 0};
    }

    // Call f for each target of a row with its active taps.
    template <class F>
    void for_pixels(int64_t patch, int32_t y, F f) const {
        constexpr int32_t FEW = 128;
        int32_t few_in[FEW], few_taps[FEW];
        std::vector<int32_t> many;
        int32_t *in = few_in, *taps = few_taps;
        if (plan_.taps() > FEW) {
            many.resize(size_t(plan_.taps()) * 2);
            in = many.data();
            taps = in + plan_.taps();
        }
        for (int32_t x = 0; x < h_.target; ++x) {
            int32_t count = 0;
            for (int32_t tap = 0; tap < plan_.taps(); ++tap) {
                const int32_t hy = v_.at[size_t(y) * v_.taps + tap / h_.taps];
                const int32_t hx = h_.at[size_t(x) * h_.taps + tap % h_.taps];
                const int32_t row = hy < 0 || hx < 0 ? INACTIVE : plan_.halo_of(patch)[int64_t(hy) * h_.halo + hx];
                if (row < 0) continue;
                in[count] = row;
                taps[count++] = args_.flip ? plan_.taps() - 1 - tap : tap;
            }
            f(PixelArgs<T>{static_cast<const T*>(args_.source), in, taps, count, static_cast<const T*>(args_.weight),
                           static_cast<const T*>(args_.bias), target_row(patch, y, x), args_.channels});
        }
    }

    const ps_depthwise_args& args_;
    const ps_plan& plan_;
    const Kernels<T>& kernels_;
    const Axis &v_, &h_;
    bool by_rows_;
};

template <class T>
int32_t run(const ps_depthwise_args& args, bool wgrad) {
    const Kernels<T>* table = kernels<T>(args.isa);
    if (table == nullptr) return -1;
    const Depthwise<T> depthwise(args, *table);
    if (wgrad) depthwise.wgrad();
    else depthwise.forward();
    return 0;
}

int32_t run(const ps_depthwise_args& args, bool wgrad) {
    if (args.dtype == PS_F32) return run<float>(args, wgrad);
    if (args.dtype == PS_F64) return run<double>(args, wgrad);
    return -1;
}

}  // namespace
}  // namespace patchsparse

int32_t ps_depthwise(const ps_depthwise_args* args) { return patchsparse::run(*args, false); }

int32_t ps_depthwise_wgrad(const ps_depthwise_args* args) { return patchsparse::run(*args, true); }
