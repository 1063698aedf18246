// Reads the weights that a thread packs next into the second-level cache while it computes, a few lines per tile. Deep
// layers have more weights than activations: waiting for them would cost as much as a third of the work.
#pragma once

#include <algorithm>
#include <cstdint>

#include "engine.h"
#include "plan/plan.h"

namespace patchsparse {

class WeightPrefetch {
  public:
    // An element of the weights has `bytes`.
    WeightPrefetch(const ps_conv_args& args, int64_t bytes)
        : args_(args), bytes_(bytes), wide_(args.plan->axis[1].taps) {}

    // Whether the weights of a tap lie in pieces worth asking for: rows of target or of source channels.
    static bool contiguous(const ps_conv_args& args) {
        return args.weight_stride[0] == 1 || args.weight_stride[1] == 1;
    }

    // Ask for `columns` target channels from `column` on, of taps [tap, tap + taps), spread over `tiles` steps.
    void begin(int64_t column, int64_t columns, int64_t tap, int64_t taps, int64_t tiles) {
        at_ = column * args_.weight_stride[0];
        by_column_ = args_.weight_stride[0] != 1;
        inner_ = by_column_ ? columns : args_.source_channels;
        piece_ = (by_column_ ? args_.source_channels : columns) * bytes_;
        left_ = contiguous(args_) && columns > 0 ? taps * inner_ : 0;
        per_step_ = (left_ + std::max<int64_t>(1, tiles) - 1) / std::max<int64_t>(1, tiles);
        tap_ = tap;
        index_ = 0;
    }

    void step() {
        for (int64_t i = 0; i < per_step_ && left_ > 0; ++i, --left_) {
            const int64_t from = at_ + tap_ / wide_ * args_.weight_stride[2] + tap_ % wide_ * args_.weight_stride[3] +
                                 index_ * args_.weight_stride[by_column_ ? 0 : 1];
            for (int64_t byte = 0; byte < piece_; byte += 64)
                __builtin_prefetch(static_cast<const char*>(args_.weight) + from * bytes_ + byte, 0, 2);
            if (++index_ == inner_) {
                index_ = 0;
                ++tap_;
            }
        }
    }

  private:
    const ps_conv_args& args_;
    int64_t bytes_, wide_, inner_ = 0, piece_ = 0, left_ = 0, per_step_ = 0, at_ = 0, tap_ = 0, index_ = 0;
    bool by_column_ = false;
};

}  // namespace patchsparse
