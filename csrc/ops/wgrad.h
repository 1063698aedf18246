// Weight gradient: per tap the product of the transposed target rows with the source rows of its active pairs.
//
// A thread owns (tap, tile of the gradient) and adds over all pairs in a fixed order: no reduction between threads,
// so the result does not depend on their number. Pairs are taken in chunks whose rows stay in the second-level cache,
// and within a chunk in runs. Policy multiplies a run: wgrad.cpp with vectors, wgrad_bf16.cpp in blocks.
//
// A run's columns (one side of its pairs) are gathered into panels; then every tile of its rows (the other side) meets
// all panels, so that the gradient is written in long pieces. Where the gradient is stored narrower than its sums,
// these have memory of their own: of a tile if one run completes it, of a block if one chunk does, else of the whole
// gradient. They are rounded tile by tile in the last run.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels/gemm.h"
#include "ops/chunks.h"
#include "plan/plan.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace patchsparse {

constexpr int64_t PANELS = 8;  // panels gathered at a time

// Policy: types Source, Sum and Result; RUN; tile_rows, tile_columns; left_size; begin, end (per thread);
// gather_columns; gather_rows, which says whether it did; multiply; narrow, if Sum is not Result.
template <class Policy>
class Wgrad {
    using Source = typename Policy::Source;
    using Sum = typename Policy::Sum;
    using Result = typename Policy::Result;
    static constexpr int64_t RUN = Policy::RUN;  // pairs
    static constexpr bool NARROWS = !std::is_same_v<Sum, Result>;

    // A run being collected: its pairs' rows on the row side p and on the column side q.
    struct Run {
        int32_t p[RUN], q[RUN];
        int64_t count = 0;
    };

  public:
    Wgrad(const ps_wgrad_args& args, const Policy& policy);

    // Return false for a layout of the weights that is not offered.
    bool run();

  private:
    struct Buffers {
        Source* panels;
        Sum *sums, *block;  // of the whole gradient, of one block; both null: sums are stored where the result belongs
    };

    // The tiles of one tap that a thread adds to: row tiles [low, high) by column tiles [first, last).
    struct Block {
        int64_t low, high, first, last;
        Sum* sums;  // of the first of them
        int64_t stride;
        bool opens, closes;  // nothing has been stored yet; nothing is added after this chunk
        Result* result;      // where the first of them belongs
        int64_t result_stride;
    };

    // Add every row tile that begins in [first, last) of the row tiles of all taps laid end to end.
    void add_share(const std::vector<int64_t>& start, int64_t first, int64_t last, const Buffers& buffers) const;
    void add_chunk(int64_t chunk, int32_t tap, Block block, const Buffers& buffers) const;
    void add_spans(const std::vector<Span>& spans, int32_t tap, Block& block, Source* panels) const;
    // `closes`: it is the last to be added to the block.
    void add_run(Run& run, Block& block, Source* panels, bool closes) const;

    // Ask for the memory that `narrow` writes, late enough for it to stay in the first-level cache.
    void prefetch(const Block& block, int64_t row, int32_t rows) const;
    void narrow(const Block& block, const Sum* sums, int64_t row, int32_t rows) const;

    int64_t first_row(int64_t tile) const { return rows_ * tile / row_tiles_; }
    int64_t panel_size() const { return RUN * policy_.tile_columns(); }
    int32_t columns_at(int64_t tile) const;
    int64_t width_of(const Block& block) const;

    const ps_wgrad_args& args_;
    const ps_plan& plan_;
    const Policy policy_;
    const Chunks chunks_;
    bool by_target_;                                     // columns are target channels
    int64_t rows_, columns_, row_tiles_, column_tiles_;  // of the gradient of a tap
};

template <class Policy>
Wgrad<Policy>::Wgrad(const ps_wgrad_args& args, const Policy& policy)
    : args_(args), plan_(*args.plan), policy_(policy),
      chunks_(plan_, (args.source_channels + args.target_channels) * int64_t(sizeof(Source)), RUN) {
    by_target_ = args.weight_stride[0] == 1 && args.weight_stride[1] != 1;
    rows_ = by_target_ ? args.source_channels : args.target_channels;
    columns_ = by_target_ ? args.target_channels : args.source_channels;
    row_tiles_ = (rows_ + policy.tile_rows() - 1) / policy.tile_rows();
    column_tiles_ = (columns_ + policy.tile_columns() - 1) / policy.tile_columns();
}

template <class Policy>
bool Wgrad<Policy>::run() {
    if (args_.weight_stride[0] != 1 && args_.weight_stride[1] != 1) return false;
    std::vector<int64_t> start{0};  // where each tap begins, in pairs times row tiles
    for (int32_t tap = 0; tap < plan_.taps(); ++tap)
        start.push_back(start.back() + (chunks_.pairs(tap) + 1) * row_tiles_);
    static thread_local Scratch kept;
    const bool whole = NARROWS && chunks_.count() > 1;
    Sum* sums = whole ? kept.get<Sum>(plan_.taps() * rows_ * columns_) : nullptr;
    auto share = [&](int thread, int team) {
        static thread_local Scratch scratch, block;
        const Buffers buffers{scratch.get<Source>(PANELS * panel_size() + policy_.left_size()), sums,
                              NARROWS && !whole ? block.get<Sum>(rows_ * PANELS * policy_.tile_columns()) : nullptr};
        const Within<Policy> within(policy_);
        add_share(start, start.back() * thread / team, start.back() * (thread + 1) / team, buffers);
    };
    parallel(args_.threads, share);
    return true;
}

template <class Policy>
void Wgrad<Policy>::add_share(const std::vector<int64_t>& start, int64_t first, int64_t last,
                              const Buffers& buffers) const {
    for (int64_t chunk = 0; chunk < chunks_.count(); ++chunk)
        for (int32_t tap = 0; tap < plan_.taps(); ++tap) {
            const int64_t step = chunks_.pairs(tap) + 1;
            const int64_t low = std::clamp<int64_t>((first - start[tap] + step - 1) / step, 0, row_tiles_);
            const int64_t high = std::clamp<int64_t>((last - start[tap] + step - 1) / step, 0, row_tiles_);
            for (int64_t c = 0; low < high && c < column_tiles_; c += PANELS)
                add_chunk(chunk, tap,
                          {low, high, c, std::min(c + PANELS, column_tiles_), nullptr, 0, chunks_.first(tap) == chunk,
                           chunks_.last(tap) == chunk, nullptr, args_.weight_stride[by_target_ ? 1 : 0]},
                          buffers);
        }
}

template <class Policy>
void Wgrad<Policy>::add_chunk(int64_t chunk, int32_t tap, Block block, const Buffers& buffers) const {
    const int32_t wide = plan_.axis[1].taps;
    const int64_t row = first_row(block.low), column = block.first * policy_.tile_columns();
    block.result = static_cast<Result*>(args_.weight) + tap / wide * args_.weight_stride[2] +
                   tap % wide * args_.weight_stride[3] + row * block.result_stride + column;
    if constexpr (NARROWS) {
        block.sums = buffers.block != nullptr ? buffers.block : buffers.sums + (tap * rows_ + row) * columns_ + column;
        block.stride = buffers.block != nullptr ? PANELS * policy_.tile_columns() : columns_;
    } else {
        block.sums = block.result;
        block.stride = block.result_stride;
    }
    add_spans(chunks_.spans(chunk), tap, block, buffers.panels);
}

template <class Policy>
void Wgrad<Policy>::add_spans(const std::vector<Span>& spans, int32_t tap, Block& block, Source* panels) const {
    Run run;
    for (const Span& span : spans) {
        const Group& group = plan_.groups[span.group];
        const int32_t j = chunks_.place(span.group, tap);
        if (j < 0) continue;
        const int32_t* source = plan_.in_rows.data() + group.in + int64_t(j) * group.rows + span.row;
        const int32_t* target = plan_.out_rows.data() + group.out + span.row;
        for (int64_t i = 0, count = 0; i < span.count; i += count) {
            if (run.count == RUN) add_run(run, block, panels, false);
            count = std::min(RUN - run.count, span.count - i);
            std::copy_n((by_target_ ? source : target) + i, count, run.p + run.count);
            std::copy_n((by_target_ ? target : source) + i, count, run.q + run.count);
            run.count += count;
        }
    }
    if (run.count > 0 || block.opens) add_run(run, block, panels, block.closes);
}

template <class Policy>
inline void Wgrad<Policy>::add_run(Run& run, Block& block, Source* panels, bool closes) const {
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
        const int64_t row = first_row(tile), down = row - first_row(block.low);
        const int32_t rows = int32_t(first_row(tile + 1) - row);
        // Sums that one run completes are stored rounded at once: one tile's memory serves all.
        Sum* sums = block.sums + (NARROWS && block.opens && closes ? 0 : down * block.stride);
        const bool gathered =
            policy_.gather_rows({p + row, rows_, run.p, run.count, rows, left}, block.last - block.first);
        for (int64_t c = block.first; c < block.last; ++c) {
            if (closes && c + 1 == block.last) prefetch(block, down, rows);
            policy_.multiply(gathered ? left : p + row, gathered ? nullptr : scattered, run.count, panel(c),
                             sums + (c - block.first) * policy_.tile_columns(), block.stride, rows, columns_at(c),
                             !block.opens);
        }
        if (closes) narrow(block, sums, down, rows);
    }
    run.count = 0;
    block.opens = false;
}

template <class Policy>
void Wgrad<Policy>::prefetch(const Block& block, int64_t row, int32_t rows) const {
    if constexpr (NARROWS)
        for (int64_t r = row; r < row + rows; ++r)
            for (int64_t n = 0; n < width_of(block); n += 64 / int64_t(sizeof(Result)))
                __builtin_prefetch(block.result + r * block.result_stride + n, 1);
}

template <class Policy>
void Wgrad<Policy>::narrow(const Block& block, const Sum* sums, int64_t row, int32_t rows) const {
    if constexpr (NARROWS)
        for (int32_t r = 0; r < rows; ++r)
            policy_.narrow(sums + r * block.stride, block.result + (row + r) * block.result_stride, width_of(block));
}

template <class Policy>
inline int32_t Wgrad<Policy>::columns_at(int64_t tile) const {
    return int32_t(std::min<int64_t>(policy_.tile_columns(), columns_ - tile * policy_.tile_columns()));
}

template <class Policy>
inline int64_t Wgrad<Policy>::width_of(const Block& block) const {
    return std::min(block.last * policy_.tile_columns(), columns_) - block.first * policy_.tile_columns();
}

}  // namespace patchsparse
