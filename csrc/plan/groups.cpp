// Groups of target rows with the same active taps, so that no product with an inactive neighbour is computed.
#include "plan/groups.h"

#include <string>
#include <unordered_map>

#include "runtime/threads.h"

namespace patchsparse {
namespace {

constexpr int64_t LEAST_ROWS = 6;     // a smaller group would leave the multiply-add units waiting for each other
constexpr int64_t SHARED_ROWS = 256;  // rows of a shared block: enough to batch by tap, few enough to stay in cache

// A cell is (patch, kind of row, kind of column): its pixels read the same patches, hence have the same active taps.
struct Cells {
    const ps_plan& plan;
    int32_t v_kinds, h_kinds;
    std::vector<int32_t> group;  // of each cell
    std::vector<int64_t> start;  // of each cell's rows within its group

    explicit Cells(const ps_plan& p)
        : plan(p), v_kinds(int32_t(p.axis[0].members.size())), h_kinds(int32_t(p.axis[1].members.size())) {
        group.resize(size_t(p.geometry.patches) * v_kinds * h_kinds);
        start.resize(group.size());
    }
    const std::vector<int32_t>& rows_of(int64_t cell) const { return plan.axis[0].members[cell / h_kinds % v_kinds]; }
    const std::vector<int32_t>& columns_of(int64_t cell) const { return plan.axis[1].members[cell % h_kinds]; }
    int64_t patch_of(int64_t cell) const { return cell / h_kinds / v_kinds; }
    int64_t size_of(int64_t cell) const { return int64_t(rows_of(cell).size()) * columns_of(cell).size(); }
    int32_t source(int64_t patch, int32_t y, int32_t x, int32_t tap) const {
        const Axis &v = plan.axis[0], &h = plan.axis[1];
        const int32_t hy = v.at[size_t(y) * v.taps + tap / h.taps], hx = h.at[size_t(x) * h.taps + tap % h.taps];
        return hy < 0 || hx < 0 ? INACTIVE : plan.halo_of(patch)[int64_t(hy) * h.halo + hx];
    }
    int32_t target(int64_t patch, int32_t y, int32_t x) const {
        return int32_t((patch * plan.axis[0].target + y) * plan.axis[1].target + x);
    }
};

// One group per distinct set of taps, in order of first appearance.
std::vector<Group> group_cells(ps_plan& plan, Cells& cells) {
    std::unordered_map<std::string, int32_t> known;
    std::vector<Group> groups;
    const int32_t taps = plan.taps();
    std::string mask;
    for (int64_t cell = 0; cell < int64_t(cells.group.size()); ++cell) {
        mask.assign((taps + 7) / 8, 0);
        const int32_t y = cells.rows_of(cell)[0], x = cells.columns_of(cell)[0];
        for (int32_t tap = 0; tap < taps; ++tap)
            if (cells.source(cells.patch_of(cell), y, x, tap) >= 0) mask[tap / 8] |= char(1 << tap % 8);
        const auto [found, is_new] = known.emplace(mask, int32_t(groups.size()));
        if (is_new) {
            Group group{0, 0, int64_t(plan.tap_ids.size()), 0, 0};
            for (int32_t tap = 0; tap < taps; ++tap)
                if (mask[tap / 8] >> tap % 8 & 1) plan.tap_ids.push_back(tap);
            group.tap_count = int32_t(plan.tap_ids.size() - group.taps);
            groups.push_back(group);
        }
        cells.group[cell] = found->second;
        cells.start[cell] = groups[found->second].rows;
        groups[found->second].rows += int32_t(cells.size_of(cell));
    }
    return groups;
}

void fill_group_rows(ps_plan& plan, const Cells& cells, const std::vector<Group>& groups, int64_t cell) {
    const Group& group = groups[cells.group[cell]];
    if (group.out < 0) return;
    const int64_t patch = cells.patch_of(cell), start = cells.start[cell];
    const std::vector<int32_t>&ys = cells.rows_of(cell), &xs = cells.columns_of(cell);
    int32_t* out = plan.out_rows.data() + group.out + start;
    for (int32_t y : ys)
        for (int32_t x : xs) *out++ = cells.target(patch, y, x);
    const Axis &v = plan.axis[0], &h = plan.axis[1];
    for (int32_t j = 0; j < group.tap_count; ++j) {
        const int32_t tap = plan.tap_ids[group.taps + j];
        int32_t* in = plan.in_rows.data() + group.in + int64_t(j) * group.rows + start;
        for (int32_t y : ys) {
            const int32_t* row = plan.halo_of(patch) + int64_t(v.at[size_t(y) * v.taps + tap / h.taps]) * h.halo;
            for (int32_t x : xs) *in++ = row[h.at[size_t(x) * h.taps + tap % h.taps]];
        }
    }
}

// Rows whose set of taps is rare, collected into blocks, and each block's pairs into one group per tap.
class SharedBlocks {
  public:
    SharedBlocks(ps_plan& plan, const Cells& cells) : plan_(plan), cells_(cells), in_(plan.taps()), out_(plan.taps()) {}

    void add(int64_t cell);
    // End the block at hand; the next row begins another one.
    void flush();

  private:
    static void append(std::vector<int32_t>& to, std::vector<int32_t>& from) {
        to.insert(to.end(), from.begin(), from.end());
        from.clear();
    }

    ps_plan& plan_;
    const Cells& cells_;
    std::vector<int32_t> rows_;
    std::vector<std::vector<int32_t>> in_, out_;
};

void SharedBlocks::add(int64_t cell) {
    const int64_t patch = cells_.patch_of(cell);
    for (int32_t y : cells_.rows_of(cell))
        for (int32_t x : cells_.columns_of(cell)) {
            if (int64_t(rows_.size()) == SHARED_ROWS) flush();
            const int32_t target = cells_.target(patch, y, x);
            rows_.push_back(target);
            for (int32_t tap = 0; tap < plan_.taps(); ++tap) {
                const int32_t source = cells_.source(patch, y, x, tap);
                if (source < 0) continue;
                in_[tap].push_back(source);
                out_[tap].push_back(target);
            }
        }
}

void SharedBlocks::flush() {
    if (rows_.empty()) return;
    Unit unit{int32_t(plan_.groups.size()), 0, true, int64_t(plan_.out_rows.size()), int64_t(rows_.size())};
    append(plan_.out_rows, rows_);
    for (int32_t tap = 0; tap < plan_.taps(); ++tap) {
        if (in_[tap].empty()) continue;
        plan_.groups.push_back({int32_t(in_[tap].size()), 1, int64_t(plan_.tap_ids.size()),
                                int64_t(plan_.out_rows.size()), int64_t(plan_.in_rows.size())});
        plan_.tap_ids.push_back(tap);
        append(plan_.in_rows, in_[tap]);
        append(plan_.out_rows, out_[tap]);
    }
    unit.last = int32_t(plan_.groups.size());
    plan_.units.push_back(unit);
}

}  // namespace

void build_groups(ps_plan& plan, int threads) {
    Cells cells(plan);
    std::vector<Group> groups = group_cells(plan, cells);
    int64_t out = 0, in = 0, common = 0;
    for (const Group& group : groups) common += group.rows >= LEAST_ROWS ? group.rows : 0;
    const bool by_tap = 2 * common < plan.target_rows();  // most rows are rare: then all are shared, tap by tap
    for (Group& group : groups) {
        const bool batched = !by_tap && (group.rows >= LEAST_ROWS || group.tap_count == 0);
        group.out = batched ? out : -1;
        group.in = in;
        if (!batched) continue;
        out += group.rows;
        in += int64_t(group.rows) * group.tap_count;
        plan.units.push_back({int32_t(plan.groups.size()), int32_t(plan.groups.size() + 1), false, 0, 0});
        plan.groups.push_back(group);
    }
    plan.out_rows.resize(out);
    plan.in_rows.resize(in);
    const int64_t per_patch = int64_t(cells.v_kinds) * cells.h_kinds;
    parallel_for(threads, plan.geometry.patches, [&](int64_t patch) {
        for (int64_t i = 0; i < per_patch; ++i) fill_group_rows(plan, cells, groups, patch * per_patch + i);
    });
    SharedBlocks shared(plan, cells);
    for (int64_t cell = 0; cell < int64_t(cells.group.size()); ++cell)
        if (groups[cells.group[cell]].out < 0) shared.add(cell);
    shared.flush();
}

std::vector<int64_t> unit_costs(const ps_plan& plan) {
    std::vector<int64_t> start{0};
    for (const Unit& unit : plan.units) {
        int64_t cost = unit.row_count;
        for (int32_t g = unit.first; g < unit.last; ++g)
            cost += int64_t(plan.groups[g].rows) * (plan.groups[g].tap_count + 1);
        start.push_back(start.back() + cost);
    }
    return start;
}

}  // namespace patchsparse
