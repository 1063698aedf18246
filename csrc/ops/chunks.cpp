#include "ops/chunks.h"

#include <algorithm>

namespace patchsparse {

constexpr int64_t CHUNK_BYTES = 1 << 20;  // of source and target rows: they stay in the second-level cache

Chunks::Chunks(const ps_plan& plan, int64_t bytes, int64_t least) : plan_(plan) {
    const int64_t limit = std::max(least, CHUNK_BYTES / bytes), taps = plan.taps();
    places_.assign(plan.groups.size() * taps, -1);
    first_.assign(taps, 0);
    last_.assign(taps, 0);
    pairs_.assign(taps, 0);
    int64_t room = -limit;
    auto open = [&] {
        spans_.emplace_back();
        room = limit;
    };
    for (const Unit& unit : plan.units) {
        if (unit.shared && room + limit / 4 < unit.row_count) open();
        for (int32_t g = unit.first; g < unit.last; ++g) {
            const int32_t rows = plan.groups[g].rows;
            for (int64_t row = 0, count = 0; row < rows; row += count) {
                if (!unit.shared && room <= 0) open();
                count = unit.shared ? rows : std::min<int64_t>(room, rows - row);
                if (!unit.shared) room -= count;
                add({g, row, count});
            }
        }
        if (unit.shared) room -= unit.row_count;
    }
    if (spans_.empty()) open();
}

void Chunks::add(const Span& span) {
    const Group& group = plan_.groups[span.group];
    spans_.back().push_back(span);
    for (int32_t j = 0; j < group.tap_count; ++j) {
        const int32_t tap = plan_.tap_ids[group.taps + j];
        places_[size_t(span.group) * plan_.taps() + tap] = j;
        last_[tap] = count() - 1;
        if (pairs_[tap] == 0) first_[tap] = last_[tap];
        pairs_[tap] += span.count;
    }
}

}  // namespace patchsparse
