// Weight gradient: per tap the product of the transposed target rows with the source rows of its active pairs.
//
// A thread owns (tap, tile of the gradient) and adds over all pairs in a fixed order: no reduction between threads,
// so the result does not depend on their number. Pairs are taken in chunks whose rows stay in the second-level cache,
// and within a chunk in runs: the columns of a run are gathered into panels, and then every tile of its rows, which
// stay in the first-level cache, meets all panels, so that the gradient is written in long pieces.
#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "plan.h"
#include "scratch.h"

namespace patchsparse {
namespace {

constexpr int64_t CACHE = 1 << 20;  // bytes of source and target rows that a chunk may touch
constexpr int64_t RUN = 256;        // pairs of a run
constexpr int64_t PANELS = 8;       // panels gathered at a time

// The pairs of one tap in one chunk: p is the broadcast side, q the vector side.
struct Pairs {
    std::vector<int32_t> p, q;
};

template <class T>
class Wgrad {
  public:
    Wgrad(const ps_wgrad_args& args, const Kernels<T>& kernels) : args_(args), plan_(*args.plan), kernels_(kernels) {
        by_target_ = args.weight_stride[0] == 1 && args.weight_stride[1] != 1;
        rows_ = by_target_ ? args.source_channels : args.target_channels;
        columns_ = by_target_ ? args.target_channels : args.source_channels;
        row_tiles_ = (rows_ + kernels.rows - 1) / kernels.rows;
        column_tiles_ = (columns_ + kernels.columns - 1) / kernels.columns;
        cut_chunks();
    }

    bool run() {
        std::vector<int64_t> start{0};  // where each tap begins, in pairs times row tiles
        for (int32_t tap = 0; tap < plan_.taps(); ++tap) start.push_back(start.back() + (pairs_[tap] + 1) * row_tiles_);
        std::atomic<bool> failed{false};
        auto share = [&](int thread, int team) {
            static thread_local Scratch scratch;
            T* panel = scratch.get<T>(PANELS * RUN * kernels_.columns);
            if (panel == nullptr) failed = true;
            else add_share(start, start.back() * thread / team, start.back() * (thread + 1) / team, panel);
        };
        parallel(args_.threads, share);
        return !failed;
    }

  private:
    void cut_chunks() {
        const int64_t bytes = (args_.source_channels + args_.target_channels) * int64_t(sizeof(T));
        const int64_t limit = std::max<int64_t>(RUN, CACHE / bytes);
        first_.assign(plan_.taps(), -1);
        pairs_.assign(plan_.taps(), 0);
        int64_t room = 0;
        for (const Group& group : plan_.groups) {
            for (int64_t row = 0; row < group.rows;) {
                if (room == 0) {
                    chunks_.emplace_back(plan_.taps());
                    room = limit;
                }
                const int64_t count = std::min<int64_t>(room, group.rows - row);
                for (int32_t j = 0; j < group.tap_count; ++j) add_pairs(group, j, row, count);
                row += count;
                room -= count;
            }
        }
        if (chunks_.empty()) chunks_.emplace_back(plan_.taps());
        for (int64_t& first : first_) first = std::max<int64_t>(first, 0);  // a tap without pairs is zeroed once
    }

    void add_pairs(const Group& group, int32_t j, int64_t row, int64_t count) {
        const int32_t tap = plan_.tap_ids[group.taps + j];
        const int32_t* source = plan_.in_rows.data() + group.in + int64_t(j) * group.rows + row;
        const int32_t* target = plan_.out_rows.data() + group.out + row;
        Pairs& pairs = chunks_.back()[tap];
        (by_target_ ? pairs.p : pairs.q).insert((by_target_ ? pairs.p : pairs.q).end(), source, source + count);
        (by_target_ ? pairs.q : pairs.p).insert((by_target_ ? pairs.q : pairs.p).end(), target, target + count);
        pairs_[tap] += count;
        if (first_[tap] < 0) first_[tap] = int64_t(chunks_.size()) - 1;
    }

    // Add every row tile that begins in [first, last) of the row tiles of all taps laid end to end.
    void add_share(const std::vector<int64_t>& start, int64_t first, int64_t last, T* panels) const {
        for (size_t chunk = 0; chunk < chunks_.size(); ++chunk)
            for (int32_t tap = 0; tap < plan_.taps(); ++tap) {
                const int64_t step = pairs_[tap] + 1;
                const int64_t low = std::clamp<int64_t>((first - start[tap] + step - 1) / step, 0, row_tiles_);
                const int64_t high = std::clamp<int64_t>((last - start[tap] + step - 1) / step, 0, row_tiles_);
                const bool opens = first_[tap] == int64_t(chunk);
                for (int64_t c = 0; low < high && c < column_tiles_; c += PANELS)
                    add_tiles(chunks_[chunk][tap], opens, tap, low, high, c, std::min(c + PANELS, column_tiles_), panels);
            }
    }

    void add_tiles(const Pairs& pairs, bool opens, int32_t tap, int64_t low, int64_t high, int64_t first, int64_t last,
                   T* panels) const {
        const int64_t pair_count = int64_t(pairs.p.size()), row_stride = args_.weight_stride[by_target_ ? 1 : 0];
        const T *source = static_cast<const T*>(args_.source), *target = static_cast<const T*>(args_.target);
        const T *p = by_target_ ? source : target, *q = by_target_ ? target : source;
        const int32_t wide = plan_.axis[1].taps;
        T* result = static_cast<T*>(args_.weight) + tap / wide * args_.weight_stride[2] + tap % wide * args_.weight_stride[3];
        const int64_t runs = std::max<int64_t>(opens, (pair_count + RUN - 1) / RUN);
        for (int64_t run = 0; run < runs; ++run, opens = false) {
            const int64_t i = pair_count * run / runs, count = pair_count * (run + 1) / runs - i;
            auto panel = [&](int64_t c) { return panels + (c - first) * RUN * kernels_.columns; };
            for (int64_t c = first; c < last; ++c)
                kernels_.gather({q + c * kernels_.columns, columns_, pairs.q.data() + i, count, columns_at(c), panel(c)});
            for (int64_t tile = low; tile < high; ++tile) {
                const int64_t row = rows_ * tile / row_tiles_;
                const int32_t rows = int32_t(rows_ * (tile + 1) / row_tiles_ - row);
                for (int64_t c = first; c < last; ++c)
                    kernels_.outer({p + row, rows_, pairs.p.data() + i, count, panel(c),
                                    result + row * row_stride + c * kernels_.columns, row_stride, rows, columns_at(c), !opens});
            }
        }
    }

    int32_t columns_at(int64_t tile) const {
        return int32_t(std::min<int64_t>(kernels_.columns, columns_ - tile * kernels_.columns));
    }

    const ps_wgrad_args& args_;
    const ps_plan& plan_;
    const Kernels<T>& kernels_;
    bool by_target_;  // vectors run over target channels
    int64_t rows_, columns_, row_tiles_, column_tiles_;  // of the gradient: broadcast and vector dimension
    std::vector<std::vector<Pairs>> chunks_;  // (chunk, tap)
    std::vector<int64_t> first_, pairs_;      // of each tap: the chunk that opens its sums, and its number of pairs
};

template <class T>
int32_t wgrad(const ps_wgrad_args& args) {
    const Kernels<T>* table = kernels<T>(args.isa);
    if (table == nullptr || (args.weight_stride[0] != 1 && args.weight_stride[1] != 1)) return -1;
    try {
        return Wgrad<T>(args, *table).run() ? 0 : -1;
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

}  // namespace
}  // namespace patchsparse

int32_t ps_wgrad(const ps_wgrad_args* args) {
    if (args->dtype == PS_F32) return patchsparse::wgrad<float>(*args);
    if (args->dtype == PS_F64) return patchsparse::wgrad<double>(*args);
    return -1;
}
