// The pairs of a plan cut into chunks whose rows stay in the cache, for the weight gradient.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "plan/plan.h"

namespace patchsparse {

// Rows [row, row + count) of a group.
struct Span {
    int32_t group;
    int64_t row, count;
};

class Chunks {
  public:
    // Cut the units of a plan, laid end to end, into chunks of as many target rows as the cache holds, and at least
    // `least`; `bytes` has a target row with a source row. A shared unit stays whole: a chunk may then run over by a
    // quarter, for a chunk of few rows would cost another round of all sums.
    Chunks(const ps_plan& plan, int64_t bytes, int64_t least);

    int64_t count() const { return int64_t(spans_.size()); }
    const std::vector<Span>& spans(int64_t chunk) const { return spans_[chunk]; }
    // The place of a tap among those of a group, or -1.
    int32_t place(int32_t group, int32_t tap) const { return places_[size_t(group) * plan_.taps() + tap]; }
    // The first and the last chunk with pairs of a tap, and how many pairs all chunks have.
    int64_t first(int32_t tap) const { return first_[tap]; }
    int64_t last(int32_t tap) const { return last_[tap]; }
    int64_t pairs(int32_t tap) const { return pairs_[tap]; }

  private:
    void add(const Span& span);

    const ps_plan& plan_;
    std::vector<std::vector<Span>> spans_;
    std::vector<int32_t> places_;
    std::vector<int64_t> first_, last_, pairs_;
};

}  // namespace patchsparse
