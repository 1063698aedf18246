// Weight gradient: per tap the product of the transposed target rows with the source rows of its active pairs.
//
// A thread owns (tap, tile of the gradient) and adds over all pairs in a fixed order: no reduction between threads,
// so the result does not depend on their number. Pairs are taken in chunks whose rows stay in the second-level cache.
#include <algorithm>
#include <new>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "plan.h"

namespace patchsparse {
namespace {

constexpr int64_t CACHE = 1 << 20;  // bytes of source and target rows that a chunk may touch

template <class T>
class Wgrad {
  public:
    Wgrad(const ps_wgrad_args& args, const Kernels<T>& kernels) : args_(args), plan_(*args.plan), kernels_(kernels) {
        by_target_ = args.weight_stride[0] == 1 && args.weight_stride[1] != 1;
        rows_ = by_target_ ? args.source_channels : args.target_channels;
        columns_ = by_target_ ? args.target_channels : args.source_channels;
        cut_chunks();
    }

    void run() {
        const int64_t row_tiles = (rows_ + kernels_.rows - 1) / kernels_.rows;
        const int64_t column_tiles = (columns_ + kernels_.columns - 1) / kernels_.columns;
        const int64_t per_tap = row_tiles * column_tiles;
        std::vector<int64_t> start{0};
        for (int32_t tap = 0; tap < plan_.taps(); ++tap) start.push_back(start.back() + pairs_[tap] + 1);
        auto share = [&](int thread, int team) {
            const int64_t total = start.back() * per_tap;
            const int64_t first = total * thread / team, last = total * (thread + 1) / team;
            for (size_t chunk = 0; chunk < chunks_.size(); ++chunk)
                for (int32_t tap = 0; tap < plan_.taps(); ++tap)
                    for (int64_t t = 0; t < per_tap; ++t) {
                        const int64_t begin = start[tap] * per_tap + t * (pairs_[tap] + 1);
                        if (begin < first || begin >= last) continue;
                        add(chunk, tap, t / column_tiles, row_tiles, t % column_tiles);
                    }
        };
        parallel(args_.threads, share);
    }

  private:
    struct Chunk {
        std::vector<std::vector<Segment>> by_tap;
    };

    void cut_chunks() {
        const int64_t bytes = (args_.source_channels + args_.target_channels) * int64_t(sizeof(T));
        const int64_t limit = std::max<int64_t>(64, CACHE / bytes);
        first_.assign(plan_.taps(), -1);
        pairs_.assign(plan_.taps(), 0);
        int64_t room = 0;
        for (const Group& group : plan_.groups) {
            for (int64_t row = 0; row < group.rows;) {
                if (room == 0) {
                    chunks_.push_back({std::vector<std::vector<Segment>>(plan_.taps())});
                    room = limit;
                }
                const int64_t count = std::min<int64_t>(room, group.rows - row);
                for (int32_t j = 0; j < group.tap_count; ++j) add_segment(group, j, row, count);
                row += count;
                room -= count;
            }
        }
        if (chunks_.empty()) chunks_.push_back({std::vector<std::vector<Segment>>(plan_.taps())});
        for (int64_t& first : first_) first = std::max<int64_t>(first, 0);  // a tap without pairs is zeroed once
    }

    void add_segment(const Group& group, int32_t j, int64_t row, int64_t count) {
        const int32_t tap = plan_.tap_ids[group.taps + j];
        const int32_t* source = plan_.in_rows.data() + group.in + int64_t(j) * group.rows + row;
        const int32_t* target = plan_.out_rows.data() + group.out + row;
        const Segment segment = by_target_ ? Segment{source, target, count} : Segment{target, source, count};
        chunks_.back().by_tap[tap].push_back(segment);
        pairs_[tap] += count;
        if (first_[tap] < 0) first_[tap] = int64_t(chunks_.size()) - 1;
    }

    void add(int64_t chunk, int32_t tap, int64_t row_tile, int64_t row_tiles, int64_t column_tile) const {
        const std::vector<Segment>& segments = chunks_[chunk].by_tap[tap];
        const bool opens = first_[tap] == chunk;
        if (segments.empty() && !opens) return;
        const int64_t row = rows_ * row_tile / row_tiles, column = column_tile * kernels_.columns;
        const int64_t row_stride = args_.weight_stride[by_target_ ? 1 : 0];
        const T *source = static_cast<const T*>(args_.source), *target = static_cast<const T*>(args_.target);
        const int32_t wide = plan_.axis[1].taps;
        T* result = static_cast<T*>(args_.weight) + tap / wide * args_.weight_stride[2] +
                    tap % wide * args_.weight_stride[3] + row * row_stride + column;
        kernels_.outer({segments.data(), int64_t(segments.size()), (by_target_ ? source : target) + row,
                        (by_target_ ? target : source) + column, rows_, columns_, result, row_stride,
                        int32_t(rows_ * (row_tile + 1) / row_tiles - row),
                        int32_t(std::min<int64_t>(kernels_.columns, columns_ - column)), !opens});
    }

    const ps_wgrad_args& args_;
    const ps_plan& plan_;
    const Kernels<T>& kernels_;
    bool by_target_;         // vectors run over target channels
    int64_t rows_, columns_;  // of the gradient: broadcast and vector dimension
    std::vector<Chunk> chunks_;
    std::vector<int64_t> first_, pairs_;  // of each tap: the chunk that opens its sums, and its number of pairs
};

template <class T>
int32_t wgrad(const ps_wgrad_args& args) {
    const Kernels<T>* table = kernels<T>(args.isa);
    if (table == nullptr || (args.weight_stride[0] != 1 && args.weight_stride[1] != 1)) return -1;
    try {
        Wgrad<T>(args, *table).run();
    } catch (const std::bad_alloc&) {
        return -1;
    }
    return 0;
}

}  // namespace
}  // namespace patchsparse

int32_t ps_wgrad(const ps_wgrad_args* args) {
    if (args->dtype == PS_F32) return patchsparse::wgrad<float>(*args);
    if (args->dtype == PS_F64) return patchsparse::wgrad<double>(*args);
    return -1;
}
