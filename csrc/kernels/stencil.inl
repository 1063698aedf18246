// Depthwise convolution and pooling: vectors run over channels. Included once per instruction set, inside a namespace.

// Rows of WIDTH targets, kernels of WIDE columns: every source pixel is loaded once per kernel row and used by up to
// WIDE targets, whose sums stay in registers.
template <class V, int WIDTH, int WIDE>
void depthwise_channels(const DepthwiseArgs<typename V::T>& a, int64_t c, int count) {
    using T = typename V::T;
    const bool full = count == V::width;
    auto load = [&](const T* p) { return full ? V::load(p) : V::load(p, count); };
    const int taps = a.kernel[0] * WIDE;
    for (int y = 0; y < a.height; ++y) {
        V sum[WIDTH];
        for (int x = 0; x < WIDTH; ++x) sum[x] = a.bias == nullptr ? V::zero() : load(a.bias + c);
        for (int ky = 0; ky < a.kernel[0]; ++ky) {
            const int32_t* halo = a.halo + (y + ky) * a.halo_row;
            V w[WIDE];
            for (int kx = 0; kx < WIDE; ++kx) {
                const int tap = ky * WIDE + kx;
                w[kx] = load(a.weight + (a.flip ? taps - 1 - tap : tap) * a.channels + c);
            }
#pragma GCC unroll 16
            for (int hx = 0; hx < WIDTH + WIDE - 1; ++hx) {
                if (halo[hx] < 0) continue;
                const V value = load(a.source + halo[hx] * a.channels + c);
#pragma GCC unroll 8
                for (int kx = 0; kx < WIDE; ++kx)
                    if (hx - kx >= 0 && hx - kx < WIDTH) sum[hx - kx].add_product(value, w[kx]);
            }
        }
        T* to = a.target + y * a.target_row + c;
        for (int x = 0; x < WIDTH; ++x, to += a.channels) {
            if (full) sum[x].store(to);
            else sum[x].store(to, count);
        }
    }
}

// The sums of one kernel row stay in registers over all rows of the patch. They begin at 0 in each patch: one sum over
// all patches would round too often.
template <class V, int WIDTH, int WIDE>
void depthwise_wgrad_channels(const DepthwiseArgs<typename V::T>& a, typename V::T* gradient, int64_t c, int count) {
    using T = typename V::T;
    const bool full = count == V::width;
    auto load = [&](const T* p) { return full ? V::load(p) : V::load(p, count); };
    for (int ky = 0; ky < a.kernel[0]; ++ky) {
        T* to = gradient + int64_t(ky) * WIDE * a.channels + c;
        V sum[WIDE];
        for (int kx = 0; kx < WIDE; ++kx) sum[kx] = V::zero();
        for (int y = 0; y < a.height; ++y) {
            const int32_t* halo = a.halo + (y + ky) * a.halo_row;
            const T* from = a.target + y * a.target_row + c;
            V g[WIDTH];
            for (int x = 0; x < WIDTH; ++x) g[x] = load(from + x * a.channels);
#pragma GCC unroll 16
            for (int hx = 0; hx < WIDTH + WIDE - 1; ++hx) {
                if (halo[hx] < 0) continue;
                const V value = load(a.source + halo[hx] * a.channels + c);
#pragma GCC unroll 8
                for (int kx = 0; kx < WIDE; ++kx)
                    if (hx - kx >= 0 && hx - kx < WIDTH) sum[kx].add_product(value, g[hx - kx]);
            }
        }
        for (int kx = 0; kx < WIDE; ++kx) {
            sum[kx].add(load(to + kx * a.channels));
            if (full) sum[kx].store(to + kx * a.channels);
            else sum[kx].store(to + kx * a.channels, count);
        }
    }
}

// Cut a patch into columns of 8, 4, 2 and 1 targets, and call f(column, Int<width>) for each.
template <class A, class F>
void for_columns(const A& a, F f) {
    A column = a;
    int left = a.width;
    auto step = [&](auto width) {
        constexpr int w = decltype(width)::value;
        for (; left >= w; left -= w, column.halo += w, column.target += w * a.channels) f(column, width);
    };
    step(Int<8>{});
    step(Int<4>{});
    step(Int<2>{});
    step(Int<1>{});
}

// Channels come first and pixels after them: the vectors of one patch and its halo fit the first-level cache.
template <class V, class A, class F>
void for_channels(const A& a, F f) {
    for (int64_t c = a.first; c < a.last; c += V::width)
        for_columns(a, [&](const A& column, auto width) { f(column, width, c, least(V::width, a.last - c)); });
}

template <class V, int WIDE>
void depthwise_wide(const DepthwiseArgs<typename V::T>& a) {
    for_channels<V>(a, [](const DepthwiseArgs<typename V::T>& column, auto width, int64_t c, int count) {
        depthwise_channels<V, decltype(width)::value, WIDE>(column, c, count);
    });
}

template <class V, int WIDE>
void depthwise_wgrad_wide(const DepthwiseArgs<typename V::T>& a, typename V::T* gradient) {
    for_channels<V>(a, [=](const DepthwiseArgs<typename V::T>& column, auto width, int64_t c, int count) {
        depthwise_wgrad_channels<V, decltype(width)::value, WIDE>(column, gradient, c, count);
    });
}

template <class V>
void depthwise_patch(const DepthwiseArgs<typename V::T>& a) {
    switch (a.kernel[1]) {
        case 3: return depthwise_wide<V, 3>(a);
        case 5: return depthwise_wide<V, 5>(a);
        case 7: return depthwise_wide<V, 7>(a);
        default: return;  // the caller asks for no other
    }
}

template <class V>
void depthwise_patch_wgrad(const DepthwiseArgs<typename V::T>& a, typename V::T* gradient) {
    switch (a.kernel[1]) {
        case 3: return depthwise_wgrad_wide<V, 3>(a, gradient);
        case 5: return depthwise_wgrad_wide<V, 5>(a, gradient);
        case 7: return depthwise_wgrad_wide<V, 7>(a, gradient);
        default: return;
    }
}

template <class V>
void depthwise_pixel(const PixelArgs<typename V::T>& a) {
    using T = typename V::T;
    constexpr int W = V::width, N = 4;
    int64_t c = a.first;
    for (; c + N * W <= a.last; c += N * W) {
        V sum[N];
        for (int n = 0; n < N; ++n) sum[n] = a.bias == nullptr ? V::zero() : V::load(a.bias + c + n * W);
        for (int32_t i = 0; i < a.count; ++i) {
            const T* x = a.source + a.in[i] * a.channels + c;
            const T* w = a.weight + a.taps[i] * a.channels + c;
            for (int n = 0; n < N; ++n) sum[n].add_product(V::load(x + n * W), V::load(w + n * W));
        }
        for (int n = 0; n < N; ++n) sum[n].store(a.target + c + n * W);
    }
    for (; c < a.last; c += W) {
        const int count = least(W, a.last - c);
        V sum = a.bias == nullptr ? V::zero() : V::load(a.bias + c, count);
        for (int32_t i = 0; i < a.count; ++i)
            sum.add_product(V::load(a.source + a.in[i] * a.channels + c, count),
                            V::load(a.weight + a.taps[i] * a.channels + c, count));
        sum.store(a.target + c, count);
    }
}

template <class V>
void depthwise_pixel_wgrad(const PixelArgs<typename V::T>& a, typename V::T* gradient) {
    using T = typename V::T;
    constexpr int W = V::width;
    for (int64_t c = a.first; c < a.last; c += W) {
        const int count = least(W, a.last - c);
        const V g = V::load(a.target + c, count);
        for (int32_t i = 0; i < a.count; ++i) {
            T* to = gradient + a.taps[i] * a.channels + c;
            V sum = V::load(to, count);
            sum.add_product(g, V::load(a.source + a.in[i] * a.channels + c, count));
            sum.store(to, count);
        }
    }
}

template <class T>
void pool_max(const T* value, int32_t tap, T* best, uint8_t* at, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c) {
        const T v = value == nullptr ? T(0) : value[c];
        const bool wins = v > best[c] || v != v;  // a NaN wins, as in PyTorch
        best[c] = wins ? v : best[c];
        at[c] = wins ? static_cast<uint8_t>(tap) : at[c];
    }
}

template <class T>
void pool_add(const T* gradient, const uint8_t* at, int32_t tap, T* sum, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c) sum[c] += at[c] == tap ? gradient[c] : T(0);
}
