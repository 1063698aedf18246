// Depthwise convolution, in one of three ways. Where stride and dilation are 1: whole patches if their rows are long
// enough (stencil.inl), else pairs of squares (squares.inl). Elsewhere: by pixel with its active taps. Each way takes
// a slice of channels at a time, narrow enough for the first-level cache.
#include <algorithm>
#include <vector>

#include "ops/ops.h"
#include "plan/plan.h"
#include "runtime/dispatch.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace patchsparse {
namespace {

constexpr int64_t SLICE = 64;  // channels
// Pixels whose lists of taps are kept while all slices pass, and whose products a gradient adds up at a time.
constexpr int64_t BATCH_PIXELS = 128;

// The active taps of a batch of targets, one list after the other.
struct TapLists {
    std::vector<int32_t> in, taps, start;
    std::vector<int64_t> target;  // row of each pixel
};

template <class T>
class Depthwise {
  public:
    Depthwise(const ps_depthwise_args& args, const Kernels<T>& kernels);

    // A target is summed by one thread, in an order that does not depend on the number of threads.
    void forward() const;

    // A thread owns a range of channels and adds over all patches in order, whatever the number of threads.
    void wgrad() const;

  private:
    // Add the products of each run of pixels up before the sums of runs: one sum of all would round too often.
    void pixels_wgrad(int64_t first, int64_t last, T* gradient) const;

    // Compute a slice of channels of a chunk, below `last`: its targets, or what it adds to the gradient.
    void squares(const SquareChunk& chunk, int64_t first, int64_t last, T* gradient = nullptr) const;

    DepthwiseArgs<T> patch_args(int64_t patch, int64_t first, int64_t last) const;

    void add_lists(TapLists& lists, int64_t patch) const;

    // Call f for each target of patches [first, last) with its active taps, slice by slice of channels [low, high), and
    // end_run for each slice of a run of targets.
    template <class F, class G>
    void for_pixels(int64_t first, int64_t last, int64_t low, int64_t high, F f, G end_run) const;

    const ps_depthwise_args& args_;
    const ps_plan& plan_;
    const Kernels<T>& kernels_;
    const Axis &v_, &h_;
    int64_t vector_, slice_;  // channels of a vector, and of a unit of work
    bool by_patch_;
};

template <class T>
Depthwise<T>::Depthwise(const ps_depthwise_args& args, const Kernels<T>& kernels)
    : args_(args), plan_(*args.plan), kernels_(kernels), v_(plan_.axis[0]), h_(plan_.axis[1]) {
    vector_ = kernels.columns / 2;
    slice_ = plan_.squares.side == 1 ? 4 * vector_ : vector_;
    const ps_geometry& g = plan_.geometry;
    const bool plain = !g.adjoint && g.stride[0] == 1 && g.stride[1] == 1 && g.dilation[0] == 1 && g.dilation[1] == 1;
    by_patch_ = kernels.depthwise_patch != nullptr && plain && (h_.taps == 3 || h_.taps == 5 || h_.taps == 7);
}

template <class T>
void Depthwise<T>::forward() const {
    const int64_t slices = (args_.channels + slice_ - 1) / slice_;
    auto share = [&](int thread, int team) {
        if (plan_.squares.side != 0) {
            const int64_t units = int64_t(plan_.squares.chunks.size()) * slices;
            for (int64_t i = units * thread / team; i < units * (thread + 1) / team; ++i)
                squares(plan_.squares.chunks[i / slices], i % slices * slice_, args_.channels);
            return;
        }
        const int64_t patches = plan_.geometry.patches;
        const int64_t first = patches * thread / team, last = patches * (thread + 1) / team;
        if (by_patch_) {
            for (int64_t patch = first; patch < last; ++patch)
                kernels_.depthwise_patch(patch_args(patch, 0, args_.channels));
            return;
        }
        auto pixel = [this](const PixelArgs<T>& a) { kernels_.depthwise_pixel(a); };
        for_pixels(first, last, 0, args_.channels, pixel, [](int64_t, int64_t) {});
    };
    parallel(args_.threads, share);
}

template <class T>
void Depthwise<T>::wgrad() const {
    T* gradient = static_cast<T*>(const_cast<void*>(args_.weight));
    const int64_t vectors = (args_.channels + vector_ - 1) / vector_;
    auto share = [&](int thread, int team) {
        const int64_t first = std::min(args_.channels, vectors * thread / team * vector_);
        const int64_t last = std::min(args_.channels, vectors * (thread + 1) / team * vector_);
        if (first == last) return;
        for (int32_t tap = 0; tap < plan_.taps(); ++tap)
            std::fill(gradient + tap * args_.channels + first, gradient + tap * args_.channels + last, T(0));
        if (plan_.squares.side != 0) {
            for (const SquareChunk& chunk : plan_.squares.chunks)
                for (int64_t c = first; c < last; c += slice_) squares(chunk, c, last, gradient);
            return;
        }
        if (by_patch_) {
            for (int64_t patch = 0; patch < plan_.geometry.patches; ++patch)
                kernels_.depthwise_patch_wgrad(patch_args(patch, first, last), gradient);
            return;
        }
        pixels_wgrad(first, last, gradient);
    };
    parallel(args_.threads, share);
}

template <class T>
void Depthwise<T>::pixels_wgrad(int64_t first, int64_t last, T* gradient) const {
    static thread_local Scratch scratch;
    T* run = scratch.get<T>(plan_.taps() * args_.channels);
    std::fill(run, run + plan_.taps() * args_.channels, T(0));
    auto add_run = [&](int64_t low, int64_t high) {
        for (int64_t tap = 0; tap < plan_.taps(); ++tap)
            for (int64_t i = tap * args_.channels + low; i < tap * args_.channels + high; ++i) {
                gradient[i] += run[i];
                run[i] = T(0);
            }
    };
    auto pixel = [&](const PixelArgs<T>& a) { kernels_.depthwise_pixel_wgrad(a, run); };
    for_pixels(0, plan_.geometry.patches, first, last, pixel, add_run);
}

template <class T>
inline void Depthwise<T>::squares(const SquareChunk& chunk, int64_t first, int64_t last, T* gradient) const {
    static thread_local Scratch scratch;
    const Squares& squares = plan_.squares;
    const int64_t vectors = 4 * int64_t(chunk.sources.size() + chunk.targets.size());
    T* memory = scratch.get<T>(vectors * vector_);
    const SquaresArgs<T> a{args_.source,
                           args_.target,
                           args_.channels,
                           squares.side,
                           h_.target,
                           chunk.sources.data(),
                           chunk.targets.data(),
                           int32_t(chunk.sources.size()),
                           int32_t(chunk.targets.size()),
                           int32_t(squares.shifts.size()),
                           squares.shifts.data(),
                           chunk.pairs.data(),
                           chunk.start.data(),
                           static_cast<const T*>(args_.weight),
                           static_cast<const T*>(args_.bias),
                           {v_.taps, h_.taps},
                           args_.flip != 0,
                           first,
                           int32_t(std::min(slice_, last - first)),
                           memory};
    if (gradient == nullptr) kernels_.depthwise_squares(a);
    else kernels_.depthwise_squares_wgrad(a, gradient);
}

template <class T>
DepthwiseArgs<T> Depthwise<T>::patch_args(int64_t patch, int64_t first, int64_t last) const {
    const int64_t row = h_.target * args_.channels;
    return {static_cast<const T*>(args_.source),
            plan_.halo_of(patch),
            h_.halo,
            {v_.taps, h_.taps},
            static_cast<const T*>(args_.weight),
            static_cast<const T*>(args_.bias),
            static_cast<T*>(args_.target) + patch * v_.target * row,
            args_.channels,
            row,
            v_.target,
            h_.target,
            args_.flip != 0,
            first,
            last};
}

template <class T>
inline void Depthwise<T>::add_lists(TapLists& lists, int64_t patch) const {
    for (int32_t y = 0; y < v_.target; ++y)
        for (int32_t x = 0; x < h_.target; ++x) {
            lists.start.push_back(int32_t(lists.in.size()));
            lists.target.push_back((patch * v_.target + y) * h_.target + x);
            for (int32_t ky = 0; ky < v_.taps; ++ky) {
                const int32_t hy = v_.at[size_t(y) * v_.taps + ky];
                for (int32_t kx = 0; hy >= 0 && kx < h_.taps; ++kx) {
                    const int32_t hx = h_.at[size_t(x) * h_.taps + kx];
                    const int32_t row = hx < 0 ? INACTIVE : plan_.halo_of(patch)[int64_t(hy) * h_.halo + hx];
                    if (row < 0) continue;
                    const int32_t tap = ky * h_.taps + kx;
                    lists.in.push_back(row);
                    lists.taps.push_back(args_.flip ? plan_.taps() - 1 - tap : tap);
                }
            }
        }
}

template <class T>
template <class F, class G>
void Depthwise<T>::for_pixels(int64_t first, int64_t last, int64_t low, int64_t high, F f, G end_run) const {
    const int64_t batch = std::max<int64_t>(1, BATCH_PIXELS / (int64_t(v_.target) * h_.target));
    TapLists lists;
    for (int64_t begin = first; begin < last; begin += batch) {
        lists.in.clear();
        lists.taps.clear();
        lists.start.clear();
        lists.target.clear();
        for (int64_t patch = begin; patch < std::min(begin + batch, last); ++patch) add_lists(lists, patch);
        lists.start.push_back(int32_t(lists.in.size()));
        for (int64_t c = low; c < high; c += SLICE) {
            const int64_t end = std::min(c + SLICE, high);
            for (size_t i = 0; i < lists.target.size(); ++i) {
                f(PixelArgs<T>{static_cast<const T*>(args_.source), lists.in.data() + lists.start[i],
                               lists.taps.data() + lists.start[i], lists.start[i + 1] - lists.start[i],
                               static_cast<const T*>(args_.weight), static_cast<const T*>(args_.bias),
                               static_cast<T*>(args_.target) + lists.target[i] * args_.channels, args_.channels, c,
                               end});
                if ((i + 1) % BATCH_PIXELS == 0 || i + 1 == lists.target.size()) end_run(c, end);
            }
        }
    }
}

template <class T>
bool run(const ps_depthwise_args& args, bool wgrad) {
    const Kernels<T>* table = kernels<T>(args.isa);
    if (table == nullptr) return false;
    const Depthwise<T> depthwise(args, *table);
    if (wgrad) depthwise.wgrad();
    else depthwise.forward();
    return true;
}

bool run(const ps_depthwise_args& args, bool wgrad) {
    if (args.dtype == PS_F32) return run<float>(args, wgrad);
    return args.dtype == PS_F64 && run<double>(args, wgrad);
}

}  // namespace

bool depthwise(const ps_depthwise_args& args) { return run(args, false); }

bool depthwise_wgrad(const ps_depthwise_args& args) { return run(args, true); }

}  // namespace patchsparse
