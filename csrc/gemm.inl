// Register tiles of the indirect GEMM, for any vector type. Included once per instruction set, inside namespace {}.
//
// A tile holds ROWS x LANES vectors of the result in registers. Per tap its source rows are found by index, then each
// channel costs LANES panel loads, ROWS broadcasts and ROWS * LANES multiply-adds: with 14 x 2 the multiply-add units
// never wait for the loads.

constexpr int LANES = 2;  // vectors per panel row

inline int least(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

template <class V, int ROWS, int N>
void tile(const TileArgs<typename V::T>& a) {
    using T = typename V::T;
    constexpr int W = V::width;
    const bool full = a.columns == N * W;
    const int tail = a.columns - (N - 1) * W;
    V sum[ROWS][N];
    if (a.accumulate) {
        for (int r = 0; r < ROWS; ++r) {
            const T* from = a.target + a.out[r] * a.target_stride;
            for (int n = 0; n < N; ++n)
                sum[r][n] = full || n < N - 1 ? V::load(from + n * W) : V::load(from + n * W, tail);
        }
    } else {
        for (int n = 0; n < N; ++n) {
            V start = V::zero();
            if (a.bias != nullptr) start = full || n < N - 1 ? V::load(a.bias + n * W) : V::load(a.bias + n * W, tail);
            for (int r = 0; r < ROWS; ++r) sum[r][n] = start;
        }
    }
    for (int32_t j = 0; j < a.tap_count; ++j) {
        const T* panel = a.panel + a.taps[j] * a.depth * (LANES * W);
        const int32_t* in = a.in + j * a.in_stride;
        const T* row[ROWS];
        for (int r = 0; r < ROWS; ++r) row[r] = a.source + in[r] * a.source_stride;
        for (int64_t k = 0; k < a.depth; ++k, panel += LANES * W) {
            V b[N];
            for (int n = 0; n < N; ++n) b[n] = V::load(panel + n * W);
            for (int r = 0; r < ROWS; ++r) {
                const V x = V::all(row[r][k]);
                for (int n = 0; n < N; ++n) sum[r][n].add_product(x, b[n]);
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        T* to = a.target + a.out[r] * a.target_stride;
        for (int n = 0; n < N; ++n)
            if (full || n < N - 1) sum[r][n].store(to + n * W);
            else sum[r][n].store(to + n * W, tail);
    }
}

// The vector matrix is read in whole vectors if FULL, else its last vector is cut at `columns`.
template <class V, int ROWS, int N, bool FULL>
void outer(const OuterArgs<typename V::T>& a) {
    using T = typename V::T;
    constexpr int W = V::width;
    const int tail = a.columns - (N - 1) * W;
    V sum[ROWS][N];
    for (int r = 0; r < ROWS; ++r)
        for (int n = 0; n < N; ++n) {
            const T* from = a.result + r * a.result_stride + n * W;
            if (!a.accumulate) sum[r][n] = V::zero();
            else sum[r][n] = FULL || n < N - 1 ? V::load(from) : V::load(from, tail);
        }
    for (int64_t s = 0; s < a.segment_count; ++s) {
        const Segment& segment = a.segments[s];
        for (int64_t i = 0; i < segment.count; ++i) {
            const T* p = a.p + segment.p[i] * a.p_stride;
            const T* q = a.q + segment.q[i] * a.q_stride;
            V b[N];
            for (int n = 0; n < N; ++n) b[n] = FULL || n < N - 1 ? V::load(q + n * W) : V::load(q + n * W, tail);
            for (int r = 0; r < ROWS; ++r) {
                const V x = V::all(p[r]);
                for (int n = 0; n < N; ++n) sum[r][n].add_product(x, b[n]);
            }
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int n = 0; n < N; ++n) {
            T* to = a.result + r * a.result_stride + n * W;
            if (FULL || n < N - 1) sum[r][n].store(to);
            else sum[r][n].store(to, tail);
        }
}

// Choose the instance for the tile's rows: tiles at the end of a group are smaller, and cost as much less.
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
    if (a.columns == LANES * V::width) outer<V, ROWS, LANES, true>(a);
    else if (a.columns > V::width) outer<V, ROWS, LANES, false>(a);
    else outer<V, ROWS, 1, false>(a);
}
