// Weight gradient: per tap the product of the transposed target rows with the source rows of its active pairs.
//
// A thread owns (tap, tile of the gradient) and adds over all pairs in a fixed order: no reduction between threads,
// so the result does not depend on their number. Pairs are taken in chunks whose rows stay in the second-level cache,
// and within a chunk in runs, which Policy multiplies: wgrad.cpp with vectors, wgrad_bf16.cpp with matrix tiles.
//
// A run's columns (one side of its pairs) are gathered into panels; then every tile of its rows (the other side) meets
// all panels, so that the gradient is written in long pieces.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "plan.h"
#include "scratch.h"

namespace patchsparse {

constexpr int64_t CHUNK_BYTES = 1 << 20;  // of source and target rows
constexpr int64_t PANELS = 8;             // panels gathered at a time

// Rows [row, row + count) of a group.
struct Span {
    int32_t group;
    int64_t row, count;
};

// Policy: types Source and Result; RUN; tile_rows, tile_columns; left_size, left_stride; begin, end (per thread);
// gather_columns; gather_rows, which says whether it did; multiply.
template <class Policy>
class Wgrad {
    using Source = typename Policy::Source;
    using Result = typename Policy::Result;
    static constexpr int64_t RUN = Policy::RUN;  // pairs

    // A run being collected: its pairs' rows on the row side p and on the column side q.
    struct Run {
        int32_t p[RUN], q[RUN];
        int64_t count = 0;
    };

  public:
    Wgrad(const ps_wgrad_args& args, const Policy& policy) : args_(args), plan_(*args.plan), policy_(policy) {
        by_target_ = args.weight_stride[0] == 1 && args.weight_stride[1] != 1;
        rows_ = by_target_ ? args.source_channels : args.target_channels;
        columns_ = by_target_ ? args.target_channels : args.source_channels;
        row_tiles_ = (rows_ + policy.tile_rows() - 1) / policy.tile_rows();
        column_tiles_ = (columns_ + policy.tile_columns() - 1) / policy.tile_columns();
        cut_chunks();
        for (int64_t i = 0; i < RUN + OUTER_AHEAD; ++i) side_by_side_[i] = std::min(i, RUN - 1) * policy.left_stride();
    }

    bool run() {
        std::vector<int64_t> start{0};  // where each tap begins, in pairs times row tiles
        for (int32_t tap = 0; tap < plan_.taps(); ++tap) start.push_back(start.back() + (pairs_[tap] + 1) * row_tiles_);
        std::atomic<bool> failed{false};
        auto share = [&](int thread, int team) {
            static thread_local Scratch scratch;
            Source* panels = scratch.get<Source>(PANELS * panel_size() + policy_.left_size());
            if (panels == nullptr) {
                failed = true;
                return;
            }
            policy_.begin();
            add_share(start, start.back() * thread / team, start.back() * (thread + 1) / team, panels);
            policy_.end();
        };
        parallel(args_.threads, share);
        return !failed;
    }

  private:
    // The tiles of one tap that a thread adds to: row tiles [low, high) by column tiles [first, last).
    struct Block {
        int64_t low, high, first, last;
        Result* result;
        bool opens;  // nothing has been stored yet
    };

    // Cut the groups laid end to end into chunks of as many target rows as the cache holds.
    void cut_chunks() {
        const int64_t bytes = (args_.source_channels + args_.target_channels) * int64_t(sizeof(Source));
        const int64_t limit = std::max<int64_t>(RUN, CHUNK_BYTES / bytes), taps = plan_.taps();
        position_.assign(plan_.groups.size() * taps, -1);
        first_.assign(taps, 0);
        pairs_.assign(taps, 0);
        int64_t room = 0;
        for (size_t g = 0; g < plan_.groups.size(); ++g) {
            const Group& group = plan_.groups[g];
            for (int32_t j = 0; j < group.tap_count; ++j) {
                const int32_t tap = plan_.tap_ids[group.taps + j];
                position_[g * taps + tap] = j;
                if (pairs_[tap] == 0) first_[tap] = int64_t(chunks_.size()) - (room > 0);
                pairs_[tap] += group.rows;
            }
            for (int64_t row = 0, count = 0; row < group.rows; row += count, room -= count) {
                if (room == 0) {
                    chunks_.emplace_back();
                    room = limit;
                }
                count = std::min<int64_t>(room, group.rows - row);
                chunks_.back().push_back({int32_t(g), row, count});
            }
        }
        if (chunks_.empty()) chunks_.emplace_back();
    }

    // Add every row tile that begins in [first, last) of the row tiles of all taps laid end to end.
    void add_share(const std::vector<int64_t>& start, int64_t first, int64_t last, Source* panels) const {
        for (size_t chunk = 0; chunk < chunks_.size(); ++chunk)
            for (int32_t tap = 0; tap < plan_.taps(); ++tap) {
                const int64_t step = pairs_[tap] + 1;
                const int64_t low = std::clamp<int64_t>((first - start[tap] + step - 1) / step, 0, row_tiles_);
                const int64_t high = std::clamp<int64_t>((last - start[tap] + step - 1) / step, 0, row_tiles_);
                for (int64_t c = 0; low < high && c < column_tiles_; c += PANELS)
                    add_chunk(chunks_[chunk], tap, first_[tap] == int64_t(chunk), low, high, c, panels);
            }
    }

    void add_chunk(const std::vector<Span>& spans, int32_t tap, bool opens, int64_t low, int64_t high, int64_t column,
                   Source* panels) const {
        const int32_t wide = plan_.axis[1].taps;
        Result* result = static_cast<Result*>(args_.weight) + tap / wide * args_.weight_stride[2] +
                         tap % wide * args_.weight_stride[3];
        Block block{low, high, column, std::min(column + PANELS, column_tiles_), result, opens};
        Run run;
        for (const Span& span : spans) {
            const Group& group = plan_.groups[span.group];
            const int32_t j = position_[size_t(span.group) * plan_.taps() + tap];
            if (j < 0) continue;
            const int32_t* source = plan_.in_rows.data() + group.in + int64_t(j) * group.rows + span.row;
            const int32_t* target = plan_.out_rows.data() + group.out + span.row;
            for (int64_t i = 0, count = 0; i < span.count; i += count) {
                count = std::min(RUN - run.count, span.count - i);
                std::copy_n((by_target_ ? source : target) + i, count, run.p + run.count);
                std::copy_n((by_target_ ? target : source) + i, count, run.q + run.count);
                run.count += count;
                if (run.count == RUN) add_run(run, block, panels);
            }
        }
        if (run.count > 0 || block.opens) add_run(run, block, panels);
    }

    void add_run(Run& run, Block& block, Source* panels) const {
        const int64_t row_stride = args_.weight_stride[by_target_ ? 1 : 0];
        const Source *source = static_cast<const Source*>(args_.source), *target = static_cast<const Source*>(args_.target);
        const Source *p = by_target_ ? source : target, *q = by_target_ ? target : source;
        Source* left = panels + PANELS * panel_size();
        auto panel = [&](int64_t c) { return panels + (c - block.first) * panel_size(); };
        for (int64_t c = block.first; c < block.last; ++c)
            policy_.gather_columns({q + c * policy_.tile_columns(), columns_, run.q, run.count, columns_at(c), panel(c)});
        int64_t scattered[RUN + OUTER_AHEAD];
        for (int64_t i = 0; i < run.count + OUTER_AHEAD && run.count > 0; ++i)
            scattered[i] = run.p[std::min(i, run.count - 1)] * rows_;
        for (int64_t tile = block.low; tile < block.high; ++tile) {
            const int64_t row = rows_ * tile / row_tiles_;
            const int32_t rows = int32_t(rows_ * (tile + 1) / row_tiles_ - row);
            const bool gathered = policy_.gather_rows({p + row, rows_, run.p, run.count, rows, left}, block.last - block.first);
            for (int64_t c = block.first; c < block.last; ++c)
                policy_.multiply(gathered ? left : p + row, gathered ? side_by_side_ : scattered, run.count, panel(c),
                                 block.result + row * row_stride + c * policy_.tile_columns(), row_stride, rows,
                                 columns_at(c), !block.opens);
        }
        run.count = 0;
        block.opens = false;
    }

    int64_t panel_size() const { return RUN * policy_.tile_columns(); }

    int32_t columns_at(int64_t tile) const {
        return int32_t(std::min<int64_t>(policy_.tile_columns(), columns_ - tile * policy_.tile_columns()));
    }

    const ps_wgrad_args& args_;
    const ps_plan& plan_;
    const Policy policy_;
    bool by_target_;  // columns are target channels
    int64_t rows_, columns_, row_tiles_, column_tiles_;  // of the gradient of a tap
    int64_t side_by_side_[RUN + OUTER_AHEAD];  // offsets of gathered rows
    std::vector<std::vector<Span>> chunks_;
    std::vector<int32_t> position_;       // (group, tap): the place of the tap in the group, or -1
    std::vector<int64_t> first_, pairs_;  // of each tap: the chunk that opens its sums, and its number of pairs
};

}  // namespace patchsparse
