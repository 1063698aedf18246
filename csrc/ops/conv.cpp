// Forward and input gradient: every (band of target channels, unit of target rows) is computed by one thread.
//
// A band is as many panels as stay in the second-level cache together; each block of target rows meets all panels of
// the band before the next block, so that its source rows are read from memory once.
#include <algorithm>
#include <vector>

#include "ops/ops.h"
#include "ops/prefetch.h"
#include "plan/groups.h"
#include "plan/plan.h"
#include "runtime/dispatch.h"
#include "runtime/scratch.h"
#include "runtime/storage.h"
#include "runtime/threads.h"

namespace patchsparse {
namespace {

constexpr int64_t BAND_BYTES = 640 << 10;  // of packed weights
constexpr int64_t BLOCK_TILES = 24;

template <class T>
class Conv {
  public:
    Conv(const ps_conv_args& args, const Kernels<T>& kernels);

    void run();

  private:
    struct Band {
        T* packed;
        int64_t panel_size;     // elements
        int64_t column, count;  // first target channel, panels
    };

    // Compute the tiles whose cost begins in [first, last) of the bands laid end to end.
    void compute(int64_t first, int64_t last, int64_t panels, int64_t bands);
    // Add up the shared units tap by tap, so that each tap's weights meet all rows while they are in the cache.
    void compute_shared(const std::vector<const Unit*>& units, const Band& band, WeightPrefetch& next) const;

    int64_t columns_of(const Band& band) const {
        return std::min(band.count * kernels_.columns, args_.target_channels - band.column);
    }
    int32_t columns_at(int64_t column) const {
        return int32_t(std::min<int64_t>(kernels_.columns, args_.target_channels - column));
    }

    // Pack taps [tap, tap + taps), which are all of them or one.
    void pack_panel(T* panel, int64_t column, int32_t tap, int32_t taps) const;
    // Write the bias, or 0, into the rows of a shared unit.
    void initialise(const Unit& unit, const Band& band) const;

    // Cut a group into tiles of nearly equal height, so that none is too low to keep the arithmetic units busy.
    void group_tiles(const Group& group, const Band& band, int64_t first, int64_t last, bool add,
                     WeightPrefetch& next) const;
    void tile(const Group& group, int64_t row, int32_t rows, const Band& band, int64_t i, bool add,
              bool has_next) const;
    // Ask for the rows that this tile will write, and for those that the next one reads at its last tap: within a
    // patch these are the rows that no tile has read before.
    void prefetch(const TileArgs<T>& a, bool has_next) const;

    const ps_conv_args& args_;
    const ps_plan& plan_;
    const Kernels<T>& kernels_;
    const Storage<T> weights_;
    std::vector<int64_t> start_;
    int64_t tiles_ = 0;    // of one panel
    bool by_tap_ = false;  // weights are packed tap by tap: all units are shared
};

template <class T>
Conv<T>::Conv(const ps_conv_args& args, const Kernels<T>& kernels)
    : args_(args), plan_(*args.plan), kernels_(kernels), weights_(kernels, args.weight_dtype),
      start_(unit_costs(plan_)) {
    for (const Group& group : plan_.groups) tiles_ += (group.rows + kernels.rows - 1) / kernels.rows;
    bool only_shared = true;
    for (const Unit& unit : plan_.units) only_shared = only_shared && unit.shared;
    by_tap_ = only_shared && WeightPrefetch::contiguous(args);
}

template <class T>
void Conv<T>::run() {
    const int64_t panel_bytes = plan_.taps() * args_.source_channels * kernels_.columns * int64_t(sizeof(T));
    const int64_t panels = (args_.target_channels + kernels_.columns - 1) / kernels_.columns;
    const int64_t fair = (2 * panels + args_.threads - 1) / std::max(1, args_.threads);  // packing is per thread
    const int64_t most = std::clamp<int64_t>(BAND_BYTES / std::max<int64_t>(1, panel_bytes), 1, fair);
    const int64_t bands = (panels + most - 1) / most;
    auto share = [&](int thread, int team) {
        const int64_t total = panels * start_.back();
        compute(total * thread / team, total * (thread + 1) / team, panels, bands);
    };
    parallel(args_.threads, share);
}

template <class T>
void Conv<T>::compute(int64_t first, int64_t last, int64_t panels, int64_t bands) {
    static thread_local Scratch scratch;
    const int64_t panel_size = plan_.taps() * args_.source_channels * kernels_.columns;
    T* packed = scratch.get<T>(panel_size * ((panels + bands - 1) / bands));
    WeightPrefetch next(args_, weights_.bytes);
    auto band_at = [&](int64_t b) {
        const int64_t p = panels * b / bands;
        return Band{packed, panel_size, p * kernels_.columns, panels * (b + 1) / bands - p};
    };
    for (int64_t b = 0; b < bands; ++b) {
        const Band band = band_at(b);
        const int64_t begin = band.column / kernels_.columns * start_.back(), end = begin + band.count * start_.back();
        if (end <= first || begin >= last) continue;
        for (int64_t i = 0; i < band.count && !by_tap_; ++i)
            pack_panel(packed + i * panel_size, band.column + i * kernels_.columns, 0, plan_.taps());
        const bool more = b + 1 < bands && end < last && !by_tap_;
        const int64_t columns = more ? columns_of(band_at(b + 1)) : 0;
        next.begin(end / start_.back() * kernels_.columns, columns, 0, plan_.taps(), tiles_ * band.count);
        std::vector<const Unit*> shared;
        for (size_t u = 0; u < plan_.units.size(); ++u) {
            const int64_t low = first - begin - start_[u] * band.count, high = last - begin - start_[u] * band.count;
            const Unit& unit = plan_.units[u];
            if (!unit.shared) group_tiles(plan_.groups[unit.first], band, low, high, false, next);
            else if (low <= 0 && 0 < high) shared.push_back(&unit);
        }
        if (!shared.empty()) compute_shared(shared, band, next);
    }
}

template <class T>
void Conv<T>::compute_shared(const std::vector<const Unit*>& units, const Band& band, WeightPrefetch& next) const {
    for (const Unit* unit : units) initialise(*unit, band);
    const int32_t taps = plan_.taps();
    for (int64_t i = 0; i < band.count; ++i) {
        const int64_t column = band.column + i * kernels_.columns;
        const Band panel{band.packed + (by_tap_ ? 0 : i * band.panel_size), band.panel_size, column, 1};
        std::vector<int32_t> at;
        for (const Unit* unit : units) at.push_back(unit->first);
        for (int32_t tap = 0; tap < taps; ++tap) {
            if (by_tap_) {
                pack_panel(panel.packed, column, tap, 1);
                const bool turn = tap + 1 == taps;
                const int64_t then = turn ? column + kernels_.columns : column;
                next.begin(then, then < args_.target_channels ? columns_at(then) : 0, turn ? 0 : tap + 1, 1,
                           tiles_ / taps);
            }
            for (size_t u = 0; u < units.size(); ++u) {
                if (at[u] == units[u]->last || plan_.tap_ids[plan_.groups[at[u]].taps] != tap) continue;
                group_tiles(plan_.groups[at[u]++], panel, 0, INT64_MAX, true, next);
            }
        }
    }
}

template <class T>
inline void Conv<T>::pack_panel(T* panel, int64_t column, int32_t tap, int32_t taps) const {
    const ps_geometry& g = plan_.geometry;
    const int64_t* stride = args_.weight_stride;
    const int64_t at = column * stride[0] + tap / g.kernel[1] * stride[2] + tap % g.kernel[1] * stride[3];
    const bool all = taps == plan_.taps();
    weights_.kernels.pack({weights_.at(args_.weight, at),
                           stride,
                           {all ? g.kernel[0] : 1, all ? g.kernel[1] : 1},
                           args_.source_channels,
                           columns_at(column),
                           panel});
}

template <class T>
void Conv<T>::initialise(const Unit& unit, const Band& band) const {
    const T* bias = static_cast<const T*>(args_.bias);
    const int64_t count = columns_of(band);
    for (int64_t i = 0; i < unit.row_count; ++i) {
        T* to = static_cast<T*>(args_.target) + plan_.out_rows[unit.rows + i] * args_.target_channels + band.column;
        for (int64_t n = 0; n < count; ++n) to[n] = bias == nullptr ? T(0) : bias[band.column + n];
    }
}

template <class T>
void Conv<T>::group_tiles(const Group& group, const Band& band, int64_t first, int64_t last, bool add,
                          WeightPrefetch& next) const {
    const int64_t tiles = (group.rows + kernels_.rows - 1) / kernels_.rows;
    const int64_t per_row = (group.tap_count + 1) * band.count;
    auto begins_before = [&](int64_t i, int64_t cost) { return group.rows * i / tiles * per_row < cost; };
    int64_t low = 0, high = tiles;
    while (low < tiles && begins_before(low, first)) ++low;
    while (high > low && !begins_before(high - 1, last)) --high;
    for (int64_t block = low; block < high; block += BLOCK_TILES)
        for (int64_t i = 0; i < band.count; ++i)
            for (int64_t t = block; t < std::min(block + BLOCK_TILES, high); ++t) {
                const int64_t row = group.rows * t / tiles;
                tile(group, row, int32_t(group.rows * (t + 1) / tiles - row), band, i, add, t + 1 < tiles);
                next.step();
            }
}

template <class T>
inline void Conv<T>::tile(const Group& group, int64_t row, int32_t rows, const Band& band, int64_t i, bool add,
                          bool has_next) const {
    const int64_t column = band.column + i * kernels_.columns;
    static constexpr int32_t FIRST = 0;  // the only tap in the panel
    const T* bias = static_cast<const T*>(args_.bias);
    const TileArgs<T> a{static_cast<const T*>(args_.source),
                        args_.source_channels,
                        plan_.in_rows.data() + group.in + row,
                        group.rows,
                        by_tap_ ? &FIRST : plan_.tap_ids.data() + group.taps,
                        group.tap_count,
                        band.packed + i * band.panel_size,
                        args_.source_channels,
                        plan_.out_rows.data() + group.out + row,
                        static_cast<T*>(args_.target) + column,
                        args_.target_channels,
                        bias == nullptr ? nullptr : bias + column,
                        rows,
                        columns_at(column),
                        add};
    prefetch(a, has_next && i == 0);
    kernels_.tile(a);
}

template <class T>
void Conv<T>::prefetch(const TileArgs<T>& a, bool has_next) const {
    for (int32_t r = 0; r < a.rows; ++r) {
        const char* to = reinterpret_cast<const char*>(a.target + a.out[r] * a.target_stride);
        for (int64_t byte = 0; byte < a.columns * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(to + byte, 1);
    }
    if (!has_next || a.tap_count == 0 || a.accumulate) return;
    const int32_t* next = a.in + (a.tap_count - 1) * a.in_stride + a.rows;
    for (int32_t r = 0; r < std::min<int32_t>(a.rows, kernels_.rows - 1); ++r) {
        const char* from = reinterpret_cast<const char*>(a.source + next[r] * a.source_stride);
        for (int64_t byte = 0; byte < a.depth * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(from + byte, 0, 2);
    }
}

template <class T>
bool conv_as(const ps_conv_args& args) {
    const Kernels<T>* table = Storage<T>::offers(args.weight_dtype) ? kernels<T>(args.isa) : nullptr;
    if (table != nullptr) Conv<T>(args, *table).run();
    return table != nullptr;
}

}  // namespace

bool conv(const ps_conv_args& args) {
    if (args.dtype == PS_F32) return conv_as<float>(args);
    return args.dtype == PS_F64 && conv_as<double>(args);
}

}  // namespace patchsparse
