// Depthwise convolution with stride 1 by pairs of squares. Included once per instruction set, inside a namespace.
//
// A square holds four vectors: 2x2 pixels of one vector of channels, or one pixel of four. A list names the pairs of a
// source square and a target square that lie alike, hence meet the same taps:
//
//   targets[ty][tx] += sources[sy][sx] * weights[tap + sy - ty][tap + sx - tx]     up to 16 products of 9 taps
//
// The taps stay in registers for the whole list: 8 loads and 4 stores for 16 products. The gradient of the weights
// keeps its sums there instead, and stores nothing.

constexpr int SQUARE = 4;  // vectors

template <int SIDE>
constexpr int DEPTH = SQUARE / (SIDE * SIDE);  // vectors of channels

template <class V, class Image>
V load_some(const Image* from, int count) {
    return count == V::width ? V::load(from) : V::load(from, count);
}

template <class V, class Image>
void store_some(const V& vector, Image* to, int count) {
    if (count == V::width) vector.store(to);
    else vector.store(to, count);
}

// The taps of a shift: (taps, channels) of weights or gradients, at the middle tap.
template <class T>
struct SquareTaps {
    T* middle;
    int64_t row, column;  // elements from one tap to the next
    int32_t columns;      // channels

    T* at(int j, int i, int first) const { return middle + j * row + i * column + first; }
    int count(int first, int width) const { return clamp(columns - first, width); }
};

constexpr bool reaches(int reach, int d) { return (reach >> (d + 1) & 1) != 0; }

// Where the vector of a pixel lies in its square.
template <int SIDE>
constexpr int vector_at(int y, int x, int n) {
    return (y * SIDE + x) * DEPTH<SIDE> + n;
}

// Call f(sy, sx, ty, tx) for all pixels of a source and a target square between which there is a tap.
template <int SIDE, int ROWS, int COLUMNS, class F>
inline __attribute__((always_inline)) void for_products(F f) {
#pragma GCC unroll 4
    for (int s = 0; s < SIDE * SIDE; ++s)
#pragma GCC unroll 4
        for (int t = 0; t < SIDE * SIDE; ++t)
            if (reaches(ROWS, s / SIDE - t / SIDE) && reaches(COLUMNS, s % SIDE - t % SIDE))
                f(s / SIDE, s % SIDE, t / SIDE, t % SIDE);
}

// Call f(j, i, n) for every tap (j, i) beside the middle one and every vector n of its channels.
template <int SIDE, int ROWS, int COLUMNS, class F>
inline __attribute__((always_inline)) void for_taps(F f) {
#pragma GCC unroll 4
    for (int j = -1; j <= 1; ++j)
#pragma GCC unroll 4
        for (int i = -1; i <= 1; ++i)
#pragma GCC unroll 4
            for (int n = 0; n < DEPTH<SIDE>; ++n)
                if (reaches(ROWS, j) && reaches(COLUMNS, i)) f(j, i, n);
}

template <class V, int SIDE, int ROWS, int COLUMNS>
void square_products(const SquarePair* pair, const SquarePair* last, const typename V::T* sources,
                     const SquareTaps<const typename V::T>& weight, typename V::T* targets) {
    constexpr int W = V::width, D = DEPTH<SIDE>;
    V w[3][3][D];
    for_taps<SIDE, ROWS, COLUMNS>([&](int j, int i, int n) {
        w[j + 1][i + 1][n] = load_some<V>(weight.at(j, i, n * W), weight.count(n * W, W));
    });
    for (; pair != last; ++pair) {
        const auto* source = sources + int64_t(pair->source) * (SQUARE * W);
        auto* target = targets + int64_t(pair->target) * (SQUARE * W);
        V value[SQUARE], sum[SQUARE];
        bool summed[SQUARE] = {};
#pragma GCC unroll 4
        for (int n = 0; n < SQUARE; ++n) value[n] = V::load(source + n * W);
#pragma GCC unroll 4
        for (int n = 0; n < SQUARE; ++n) sum[n] = V::load(target + n * W);
        for_products<SIDE, ROWS, COLUMNS>([&](int sy, int sx, int ty, int tx) {
#pragma GCC unroll 4
            for (int n = 0; n < D; ++n) {
                const int to = vector_at<SIDE>(ty, tx, n);
                sum[to].add_product(value[vector_at<SIDE>(sy, sx, n)], w[sy - ty + 1][sx - tx + 1][n]);
                summed[to] = true;
            }
        });
#pragma GCC unroll 4
        for (int n = 0; n < SQUARE; ++n)
            if (summed[n]) sum[n].store(target + n * W);
    }
}

// With 32 registers every product has a sum of its own, so that none waits for another; with 16, every tap has one.
template <class V, int SIDE, int ROWS, int COLUMNS>
void square_wgrad(const SquarePair* pair, const SquarePair* last, const typename V::T* sources,
                  const SquareTaps<typename V::T>& gradient, const typename V::T* targets) {
    constexpr int W = V::width, D = DEPTH<SIDE>, PIXELS = SIDE * SIDE;
    constexpr int SETS = W == 16 ? PIXELS : 1;
    V sum[SETS][3][3][D];
    for (auto& set : sum)
        for (auto& row : set)
            for (auto& tap : row)
                for (V& vector : tap) vector = V::zero();
    for (; pair != last; ++pair) {
        const auto* source = sources + int64_t(pair->source) * (SQUARE * W);
        const auto* target = targets + int64_t(pair->target) * (SQUARE * W);
        V value[SQUARE], g[SQUARE];
#pragma GCC unroll 4
        for (int n = 0; n < SQUARE; ++n) value[n] = V::load(source + n * W);
#pragma GCC unroll 4
        for (int n = 0; n < SQUARE; ++n) g[n] = V::load(target + n * W);
        for_products<SIDE, ROWS, COLUMNS>([&](int sy, int sx, int ty, int tx) {
#pragma GCC unroll 4
            for (int n = 0; n < D; ++n)
                sum[(sy * SIDE + sx) % SETS][sy - ty + 1][sx - tx + 1][n].add_product(value[vector_at<SIDE>(sy, sx, n)],
                                                                                      g[vector_at<SIDE>(ty, tx, n)]);
        });
    }
    for_taps<SIDE, ROWS, COLUMNS>([&](int j, int i, int n) {
        auto* to = gradient.at(j, i, n * W);
        const int count = gradient.count(n * W, W);
        V total = load_some<V>(to, count);
        for (int set = 0; set < SETS; ++set) total.add(sum[set][j + 1][i + 1][n]);
        store_some(total, to, count);
    });
}

// Call f(Int<reach>) for the sets of taps that a shift can reach along one axis.
template <int SIDE, class F>
void with_reach(int reach, F f) {
    if constexpr (SIDE == 1) return f(Int<2>{});
    switch (reach) {
        case 1: return f(Int<1>{});
        case 2: return f(Int<2>{});
        case 3: return f(Int<3>{});
        case 4: return f(Int<4>{});
        case 6: return f(Int<6>{});
        default: return f(Int<7>{});
    }
}

// The squares of one call in memory of their own, four vectors each: without the strides of an image.
template <class V, int SIDE>
struct SquareBuffers {
    using T = typename V::T;
    static constexpr int W = V::width, D = DEPTH<SIDE>;
    const SquaresArgs<T>& a;
    T *sources, *targets;

    explicit SquareBuffers(const SquaresArgs<T>& args)
        : a(args), sources(args.scratch), targets(sources + int64_t(a.source_count) * SQUARE * W) {}

    int count(int n) const { return clamp(a.columns - n * W, W); }

    // Call f(channels of a pixel, its vectors) for each pixel of the squares at `rows`.
    template <class Image, class F>
    void for_pixels(Image* image, const int32_t* rows, int32_t squares, T* vectors, F f) const {
        for (int32_t i = 0; i < squares; ++i)
#pragma GCC unroll 2
            for (int y = 0; y < SIDE; ++y)
#pragma GCC unroll 2
                for (int x = 0; x < SIDE; ++x, vectors += D * W)
                    f(image + (rows[i] + int64_t(y) * a.pitch + x) * a.channels + a.first, vectors);
    }

    // Read squares, and prefetch what the next slice of channels will read.
    template <class Image>
    void read(const Image* image, const int32_t* rows, int32_t squares, T* to) const {
        for_pixels(image, rows, squares, to, [this](const Image* pixel, T* vectors) {
            __builtin_prefetch(pixel + D * W);
            for (int n = 0; n < D; ++n) load_some<V>(pixel + n * W, count(n)).store(vectors + n * W);
        });
    }

    void start_targets() const {
        V start[SQUARE];
        for (int n = 0; n < SQUARE; ++n) {
            const int c = n % D;
            start[n] = a.bias == nullptr ? V::zero() : load_some<V>(a.bias + a.first + c * W, count(c));
        }
        for (int64_t i = 0; i < a.target_count; ++i)
            for (int n = 0; n < SQUARE; ++n) start[n].store(targets + (i * SQUARE + n) * W);
    }

    template <class Image>
    void write_targets(Image* image) const {
        for_pixels(image, a.targets, a.target_count, targets, [this](Image* pixel, const T* vectors) {
            __builtin_prefetch(pixel + D * W, 1);
            for (int n = 0; n < D; ++n) store_some(V::load(vectors + n * W), pixel + n * W, count(n));
        });
    }

    // Call f(Int<rows>, Int<columns>, first pair, last pair, taps) for each shift; taps are of (taps, channels).
    template <class Tap, class F>
    void for_shifts(Tap* taps, F f) const;
};

template <class V, int SIDE>
template <class Tap, class F>
inline void SquareBuffers<V, SIDE>::for_shifts(Tap* taps, F f) const {
    const int64_t step = a.flip ? -a.channels : a.channels, row = a.kernel[1] * step;
    Tap* first = taps + a.first + (a.flip ? (int64_t(a.kernel[0]) * a.kernel[1] - 1) * a.channels : 0);
    for (int32_t s = 0; s < a.shift_count; ++s) {
        const SquareShift& shift = a.shifts[s];
        const SquareTaps<Tap> at{first + shift.tap[0] * row + shift.tap[1] * step, row, step, a.columns};
        with_reach<SIDE>(shift.reach[0], [&](auto rows) {
            with_reach<SIDE>(shift.reach[1], [&](auto columns) {
                f(rows, columns, a.pairs + a.start[s], a.pairs + a.start[s + 1], at);
            });
        });
    }
}

template <class V, class Image, int SIDE>
void squares_forward(const SquaresArgs<typename V::T>& a) {
    const SquareBuffers<V, SIDE> buffers(a);
    buffers.read(static_cast<const Image*>(a.source), a.sources, a.source_count, buffers.sources);
    buffers.start_targets();
    buffers.for_shifts(a.weight, [&](auto rows, auto columns, auto* first, auto* last, const auto& weight) {
        square_products<V, SIDE, decltype(rows)::value, decltype(columns)::value>(first, last, buffers.sources, weight,
                                                                                  buffers.targets);
    });
    buffers.write_targets(static_cast<Image*>(a.target));
}

template <class V, class Image, int SIDE>
void squares_wgrad(const SquaresArgs<typename V::T>& a, typename V::T* gradients) {
    const SquareBuffers<V, SIDE> buffers(a);
    buffers.read(static_cast<const Image*>(a.source), a.sources, a.source_count, buffers.sources);
    buffers.read(static_cast<const Image*>(a.target), a.targets, a.target_count, buffers.targets);
    buffers.for_shifts(gradients, [&](auto rows, auto columns, auto* first, auto* last, const auto& gradient) {
        square_wgrad<V, SIDE, decltype(rows)::value, decltype(columns)::value>(first, last, buffers.sources, gradient,
                                                                               buffers.targets);
    });
}

template <class V, class Image>
void depthwise_squares(const SquaresArgs<typename V::T>& a) {
    if (a.side == 2) squares_forward<V, Image, 2>(a);
    else squares_forward<V, Image, 1>(a);
}

template <class V, class Image>
void depthwise_squares_wgrad(const SquaresArgs<typename V::T>& a, typename V::T* gradient) {
    if (a.side == 2) squares_wgrad<V, Image, 2>(a, gradient);
    else squares_wgrad<V, Image, 1>(a, gradient);
}
