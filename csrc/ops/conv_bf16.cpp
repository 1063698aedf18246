// Forward and input gradient in bfloat16, summed in float32, by matrix tiles or vectors of pairs.
//
// Matrix tiles load rows at equal distances, so the source rows of 32 targets are gathered once for all their taps and
// then meet every panel of the band. Vectors read them where they lie. Threads share the work as in conv.cpp.
#include <algorithm>
#include <vector>

#include "kernels/bf16.h"
#include "ops/ops.h"
#include "plan/groups.h"
#include "plan/plan.h"
#include "runtime/dispatch.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace patchsparse {
namespace {

constexpr int64_t BAND_BYTES = 1 << 20;  // of packed weights
constexpr int64_t BLOCK = BF16_TILE * BF16_TILE;

class ConvBf16 {
  public:
    ConvBf16(const ps_conv_args& args, const Bf16Kernels& kernels);

    void run();

  private:
    struct Band {
        Bf16 *packed, *blocks;
        int64_t column, count;  // first target channel, panels
    };

    // Compute the tiles whose cost begins in [first, last) of the bands laid end to end.
    void compute(int64_t first, int64_t last, int64_t panels, int64_t bands) const;
    // Shared rows are summed in float32 memory, tap by tap, and narrowed at the end.
    void compute_shared(const std::vector<const Unit*>& units, const Band& band) const;
    // Pack the weights of a tap into all panels of a band, at `place` of the taps that they have room for.
    void pack(const Band& band, int32_t tap, int32_t place) const;
    // Call f(its sums, its target) for each row of shared units.
    template <class F>
    void for_rows(const std::vector<const Unit*>& units, const Band& band, F f) const;
    // Compute the tiles of a group whose cost begins in [first, last); add to `sums`, or store if it is null.
    void group_tiles(const Group& group, const Band& band, int64_t first, int64_t last, float* sums) const;

    int64_t panel_size() const { return packed_taps_ * steps_ * BLOCK; }
    int64_t columns_of(const Band& band) const {
        return std::min(band.count * BF16_TILE, args_.target_channels - band.column);
    }
    int32_t columns_at(int64_t column) const {
        return int32_t(std::min<int64_t>(BF16_TILE, args_.target_channels - column));
    }

    const ps_conv_args& args_;
    const ps_plan& plan_;
    const Bf16Kernels& kernels_;
    std::vector<int64_t> start_;
    int64_t steps_;          // of 32 source channels
    int64_t packed_taps_;    // taps that are packed at a time
    bool by_tap_ = true;     // weights are packed tap by tap: all units are shared
    bool shares_ = false;    // some unit is shared
    float* sums_ = nullptr;  // of shared units
};

ConvBf16::ConvBf16(const ps_conv_args& args, const Bf16Kernels& kernels)
    : args_(args), plan_(*args.plan), kernels_(kernels), start_(unit_costs(plan_)),
      steps_((args.source_channels + BF16_TILE - 1) / BF16_TILE) {
    for (const Unit& unit : plan_.units) {
        by_tap_ = by_tap_ && unit.shared;
        shares_ = shares_ || unit.shared;
    }
    packed_taps_ = by_tap_ ? 1 : plan_.taps();
}

void ConvBf16::run() {
    static thread_local Scratch kept;
    if (shares_) sums_ = kept.get<float>(plan_.target_rows() * args_.target_channels);
    const int64_t panels = (args_.target_channels + BF16_TILE - 1) / BF16_TILE;
    const int64_t fit = BAND_BYTES / std::max<int64_t>(1, panel_size() * int64_t(sizeof(Bf16)));
    const int64_t fair = by_tap_ ? (panels + args_.threads - 1) / std::max(1, args_.threads) : panels;
    const int64_t most = std::clamp<int64_t>(fit, 1, std::max<int64_t>(1, fair)), bands = (panels + most - 1) / most;
    auto share = [&](int thread, int team) {
        const int64_t total = panels * start_.back();
        const Within<Bf16Kernels> within(kernels_);
        compute(total * thread / team, total * (thread + 1) / team, panels, bands);
    };
    parallel(args_.threads, share);
}

void ConvBf16::compute(int64_t first, int64_t last, int64_t panels, int64_t bands) const {
    static thread_local Scratch scratch;
    const int64_t packed_size = panel_size() * ((panels + bands - 1) / bands);
    Bf16* packed = scratch.get<Bf16>(packed_size + packed_taps_ * steps_ * BLOCK);
    for (int64_t b = 0; b < bands; ++b) {
        const int64_t p = panels * b / bands, count = panels * (b + 1) / bands - p;
        const int64_t begin = p * start_.back(), end = begin + count * start_.back();
        if (end <= first || begin >= last) continue;
        const Band band{packed, packed + packed_size, p * BF16_TILE, count};
        for (int32_t tap = 0; tap < plan_.taps() && !by_tap_; ++tap) pack(band, tap, tap);
        std::vector<const Unit*> shared;
        for (size_t u = 0; u < plan_.units.size(); ++u) {
            const int64_t low = first - begin - start_[u] * count, high = last - begin - start_[u] * count;
            const Unit& unit = plan_.units[u];
            if (!unit.shared) group_tiles(plan_.groups[unit.first], band, low, high, nullptr);
            else if (low <= 0 && 0 < high) shared.push_back(&unit);
        }
        if (!shared.empty()) compute_shared(shared, band);
    }
}

inline void ConvBf16::pack(const Band& band, int32_t tap, int32_t place) const {
    const int64_t* stride = args_.weight_stride;
    const int32_t wide = plan_.axis[1].taps;
    for (int64_t i = 0; i < band.count; ++i) {
        const int64_t column = band.column + i * BF16_TILE;
        const Bf16* weight = static_cast<const Bf16*>(args_.weight) + column * stride[0] + tap / wide * stride[2] +
                             tap % wide * stride[3];
        kernels_.pack({weight,
                       {stride[0], stride[1]},
                       args_.source_channels,
                       columns_at(column),
                       band.packed + i * panel_size() + place * steps_ * BLOCK});
    }
}

void ConvBf16::compute_shared(const std::vector<const Unit*>& units, const Band& band) const {
    const int64_t columns = columns_of(band);
    for_rows(units, band, [&](float* sum, Bf16*) { std::fill(sum, sum + columns, 0.0f); });
    std::vector<int32_t> at;
    for (const Unit* unit : units) at.push_back(unit->first);
    for (int32_t tap = 0; tap < plan_.taps(); ++tap) {
        if (by_tap_) pack(band, tap, 0);
        for (size_t u = 0; u < units.size(); ++u) {
            if (at[u] == units[u]->last || plan_.tap_ids[plan_.groups[at[u]].taps] != tap) continue;
            group_tiles(plan_.groups[at[u]++], band, 0, INT64_MAX, sums_);
        }
    }
    const Bf16* bias = args_.bias == nullptr ? nullptr : static_cast<const Bf16*>(args_.bias) + band.column;
    for_rows(units, band, [&](float* sum, Bf16* to) {
        for (int64_t n = 0; n < columns && bias != nullptr; ++n) sum[n] += from_bf16(bias[n]);
        kernels_.narrow(sum, to, columns);
    });
}

template <class F>
void ConvBf16::for_rows(const std::vector<const Unit*>& units, const Band& band, F f) const {
    for (const Unit* unit : units)
        for (int64_t i = 0; i < unit->row_count; ++i) {
            const int64_t at = plan_.out_rows[unit->rows + i] * args_.target_channels + band.column;
            f(sums_ + at, static_cast<Bf16*>(args_.target) + at);
        }
}

void ConvBf16::group_tiles(const Group& group, const Band& band, int64_t first, int64_t last, float* sums) const {
    static constexpr int32_t FIRST = 0;  // the only tap in the panel
    const Bf16 *source = static_cast<const Bf16*>(args_.source), *bias = static_cast<const Bf16*>(args_.bias);
    const int64_t per_row = (group.tap_count + 1) * band.count;
    for (int64_t row = 0; row < group.rows; row += BF16_TILE) {
        if (row * per_row < first || row * per_row >= last) continue;
        const int32_t rows = int32_t(std::min<int64_t>(BF16_TILE, group.rows - row));
        const int32_t* in = plan_.in_rows.data() + group.in + row;
        for (int32_t j = 0; j < group.tap_count && kernels_.gather != nullptr; ++j)
            kernels_.gather({source, args_.source_channels, in + int64_t(j) * group.rows, rows,
                             int32_t(args_.source_channels), band.blocks + j * steps_ * BLOCK});
        for (int64_t i = 0; i < band.count; ++i) {
            const int64_t column = band.column + i * BF16_TILE;
            kernels_.tile({band.blocks, source, in, group.rows, by_tap_ ? &FIRST : plan_.tap_ids.data() + group.taps,
                           group.tap_count, band.packed + i * panel_size(), args_.source_channels,
                           plan_.out_rows.data() + group.out + row, static_cast<Bf16*>(args_.target) + column,
                           sums == nullptr ? nullptr : sums + column, args_.target_channels,
                           bias == nullptr ? nullptr : bias + column, rows, columns_at(column)});
        }
    }
}

}  // namespace

bool conv_bf16(const ps_conv_args& args) {
    const Bf16Kernels* table = args.weight_dtype == PS_BF16 ? kernels_bf16(args.isa) : nullptr;
    if (table != nullptr) ConvBf16(args, *table).run();
    return table != nullptr;
}

}  // namespace patchsparse
