// The halo table of a plan: for every patch, the source row of each pixel of the patch and around it.
#include "plan/halo.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <vector>

#include "runtime/threads.h"

namespace patchsparse {
namespace {

Axis make_axis(const ps_geometry& g, int side) {
    const int32_t k = g.kernel[side], s = g.stride[side], pad = g.padding[side], d = g.dilation[side];
    Axis axis{};
    axis.source = g.source[side];
    axis.target = g.adjoint ? axis.source * s : axis.source / s;
    axis.taps = k;
    axis.before = g.adjoint ? (d * (k - 1) - pad) / s : pad;
    axis.at.resize(size_t(axis.target) * k);
    std::map<std::vector<int32_t>, int32_t> kinds;
    for (int32_t o = 0; o < axis.target; ++o) {
        std::vector<int32_t> neighbours(k);
        for (int32_t tap = 0; tap < k; ++tap) {
            const int32_t pixel = g.adjoint ? o + pad - tap * d : o * s + tap * d - pad;
            const bool reads = !g.adjoint || floor_div(pixel, s) * s == pixel;
            const int32_t source = g.adjoint ? floor_div(pixel, s) : pixel;
            axis.at[size_t(o) * k + tap] = reads ? source + axis.before : -1;
            neighbours[tap] = reads ? floor_div(source, axis.source) : INT32_MIN;
            if (reads) axis.halo = std::max(axis.halo, source + axis.before + 1);
        }
        const int32_t kind = kinds.emplace(neighbours, int32_t(kinds.size())).first->second;
        axis.kind.push_back(kind);
        if (kind == int32_t(axis.members.size())) axis.members.emplace_back();
        axis.members[kind].push_back(o);
    }
    return axis;
}

}  // namespace

void build_halo(ps_plan& plan, const int32_t* slot, const int32_t* coords, int threads) {
    const ps_geometry& g = plan.geometry;
    for (int side = 0; side < 2; ++side) plan.axis[side] = make_axis(g, side);
    const Axis &v = plan.axis[0], &h = plan.axis[1];
    plan.halo.resize(size_t(g.patches) * v.halo * h.halo);
    parallel_for(threads, g.patches, [&](int64_t n) {
        const int32_t image = coords[3 * n], row = coords[3 * n + 1], column = coords[3 * n + 2];
        if (image < 0 || image >= g.images || row < 0 || row >= g.grid_rows || column < 0 || column >= g.grid_columns)
            throw std::invalid_argument("coords");
        int32_t* out = plan.halo.data() + n * v.halo * h.halo;
        for (int32_t y = 0; y < v.halo; ++y) {
            const int32_t above = floor_div(y - v.before, v.source), r = row + above;
            const int32_t py = y - v.before - above * v.source;
            for (int32_t x = 0; x < h.halo; ++x) {
                const int32_t left = floor_div(x - h.before, h.source), c = column + left;
                const int32_t px = x - h.before - left * h.source;
                int32_t value = OUTSIDE;
                if (r >= 0 && r < g.grid_rows && c >= 0 && c < g.grid_columns) {
                    const int32_t at = slot[(int64_t(image) * g.grid_rows + r) * g.grid_columns + c];
                    if (at >= g.patches) throw std::invalid_argument("slot");
                    value = at < 0 ? INACTIVE : (at * v.source + py) * h.source + px;
                }
                *out++ = value;
            }
        }
    });
}

}  // namespace patchsparse
