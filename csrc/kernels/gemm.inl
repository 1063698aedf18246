// Register tiles of the indirect GEMM, for any vector type. Included once per instruction set, inside a namespace.
//
// A tile holds ROWS x LANES vectors of the result in registers. Per tap its source rows are found by index, then each
// channel costs LANES panel loads, ROWS broadcasts and ROWS * LANES multiply-adds: with 12 x 2 the multiply-add units
// never wait for the loads, and the addresses of the rows still fit in registers.

constexpr int LANES = 2;  // vectors per panel row

inline int least(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

inline int clamp(int a, int most) { return a < 0 ? 0 : least(a, most); }

// Vector n of N of a row; the last one stops at `tail` elements, which is the whole vector in all but the last panel.
// Always masking it leaves no branch, so that the sums never leave their registers.
template <class V, int N>
V load_part(const typename V::T* row, int n, int tail) {
    return n < N - 1 ? V::load(row + n * V::width) : V::load(row + n * V::width, tail);
}

template <class V, int N>
void store_part(const V& sum, typename V::T* row, int n, int tail) {
    if (n < N - 1) sum.store(row + n * V::width);
    else sum.store(row + n * V::width, tail);
}

template <class V, int ROWS, int N>
void tile(const TileArgs<typename V::T>& a) {
    using T = typename V::T;
    constexpr int W = V::width;
    const int tail = a.columns - (N - 1) * W;
    V sum[ROWS][N];
    if (a.accumulate) {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
            for (int n = 0; n < N; ++n) sum[r][n] = load_part<V, N>(a.target + a.out[r] * a.target_stride, n, tail);
    } else {
        for (int n = 0; n < N; ++n) {
            const V start = a.bias != nullptr ? load_part<V, N>(a.bias, n, tail) : V::zero();
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) sum[r][n] = start;
        }
    }
    for (int32_t j = 0; j < a.tap_count; ++j) {
        const T* panel = a.panel + a.taps[j] * a.depth * (LANES * W);
        const int32_t* in = a.in + j * a.in_stride;
        const T* row[ROWS];
        for (int r = 0; r < ROWS; ++r) row[r] = a.source + in[r] * a.source_stride;
        auto channel = [&](int64_t k, const T* at) {
            V b[N];
            for (int n = 0; n < N; ++n) b[n] = V::load(at + n * W);
            for (int r = 0; r < ROWS; ++r) {
                const V x = V::all(row[r][k]);
                for (int n = 0; n < N; ++n) sum[r][n].add_product(x, b[n]);
            }
        };
        // Unrolled by 4, the rounds are few enough for the processor to foresee the last: a wrong guess per tap costs a
        // twentieth at 64 channels. One loop: with a second one for what is left, GCC moves sums to memory and back.
#pragma GCC unroll 4
        for (int64_t k = 0; k < a.depth; ++k, panel += LANES * W) channel(k, panel);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
        for (int n = 0; n < N; ++n) store_part<V, N>(sum[r][n], a.target + a.out[r] * a.target_stride, n, tail);
}

template <class V, int ROWS, int N>
void outer(const OuterArgs<typename V::T>& a) {
    using T = typename V::T;
    constexpr int W = V::width;
    const int tail = a.columns - (N - 1) * W;
    V sum[ROWS][N];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
        for (int n = 0; n < N; ++n) {
            __builtin_prefetch(a.result + r * a.result_stride + n * W, 1);
            sum[r][n] = V::zero();
        }
    auto pair = [&](const T* p, const T* at) {
        V b[N];
        for (int n = 0; n < N; ++n) b[n] = V::load(at + n * W);
        for (int r = 0; r < ROWS; ++r) {
            const V x = V::all(p[r]);
            for (int n = 0; n < N; ++n) sum[r][n].add_product(x, b[n]);
        }
    };
    const T *p = a.p, *panel = a.panel;
    if (a.offsets == nullptr) {
        // Nothing but loads and products: where two threads share a core, every other instruction costs time.
#pragma GCC unroll 4
        for (int64_t i = 0; i < a.count; ++i, p += W, panel += LANES * W) pair(p, panel);
    } else {
        for (int64_t i = 0; i < a.count; ++i, panel += LANES * W) {
            const T* ahead = p + a.offsets[i + OUTER_AHEAD];  // found by index: the processor cannot foresee it
            __builtin_prefetch(ahead);
            __builtin_prefetch(ahead + ROWS - 1);
            pair(p + a.offsets[i], panel);
        }
    }
    if (a.accumulate) {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
            for (int n = 0; n < N; ++n) sum[r][n].add(load_part<V, N>(a.result + r * a.result_stride, n, tail));
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
        for (int n = 0; n < N; ++n) store_part<V, N>(sum[r][n], a.result + r * a.result_stride, n, tail);
}

template <class V>
void narrow(const typename V::T* from, Bf16* to, int64_t count) {
    int64_t n = 0;
    for (; n + V::width <= count; n += V::width) V::load(from + n).store(to + n, V::width);
    const int tail = int(count - n);
    if (tail > 0) V::load(from + n, tail).store(to + n, tail);
}

// Copy columns of indexed rows side by side, so that they stay in the first-level cache whatever the rows' distance.
template <class V, int N>
void gather(const GatherArgs<typename V::T>& a) {
    constexpr int W = V::width;
    typename V::T* out = a.out;
    for (int64_t i = 0; i < a.count; ++i, out += N * W) {
        const typename V::T* from = a.source + a.at[i] * a.stride;
        if (a.columns == N * W) {
            for (int n = 0; n < N; ++n) V::load(from + n * W).store(out + n * W);
        } else {
            for (int n = 0; n < N; ++n) V::load(from + n * W, clamp(a.columns - n * W, W)).store(out + n * W);
        }
    }
}

// Choose the instance for the tile's rows: smaller tiles at the end of a group cost less.
template <class V, int ROWS>
void any_tile(const TileArgs<typename V::T>& a) {
    if constexpr (ROWS > 1) {
        if (a.rows < ROWS) return any_tile<V, ROWS - 1>(a);
    }
    if (a.columns > V::width) tile<V, ROWS, LANES>(a);
    else tile<V, ROWS, 1>(a);
}

template <class V, int ROWS>
void any_outer(const OuterArgs<typename V::T>& a) {
    if constexpr (ROWS > 1) {
        if (a.rows < ROWS) return any_outer<V, ROWS - 1>(a);
    }
    if (a.columns > V::width) outer<V, ROWS, LANES>(a);
    else outer<V, ROWS, 1>(a);
}
