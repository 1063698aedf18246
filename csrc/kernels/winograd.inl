// Winograd's minimal filtering F(2x2, 3x3), for any vector type. Included once per instruction set, inside a namespace.
//
//     y = A' [ (G g G') * (B' d B) ] A        d 4x4 sources, g 3x3 weights, y 2x2 targets, * element by element
//
//          1  0 -1  0           1   0   0
//     B' = 0  1  1  0       G = .5  .5  .5      A' = 1  1  1  0
//          0 -1  1  0           .5 -.5  .5           0  1 -1 -1
//          0  1  0 -1           0   0   1
//
// 16 products instead of 36. The weight gradient is the same form read backwards: dg = G' [ (B' d B) * (A dy A') ] G.
// Images and weights are stored as S, which is V's own type or bfloat16; all sums are V's. (Winograd 1980; for images:
// Lavin and Gray, arXiv 1509.09308.)

// Row R of B', of A and of G' times a column of values at(0), at(1), ...
template <class V, int R, class At>
V source_row(At at) {
    if constexpr (R == 0) return at(0).minus(at(2));
    if constexpr (R == 1) return at(1).plus(at(2));
    if constexpr (R == 2) return at(2).minus(at(1));
    if constexpr (R == 3) return at(1).minus(at(3));
}

template <class V, int R, class At>
V gradient_row(At at) {
    if constexpr (R == 0) return at(0);
    if constexpr (R == 1) return at(0).plus(at(1));
    if constexpr (R == 2) return at(0).minus(at(1));
    if constexpr (R == 3) return V::zero().minus(at(1));
}

template <class V, int R, class At>
V wgrad_row(At at) {
    if constexpr (R == 0) return at(0).plus(at(1).plus(at(2)).half());
    if constexpr (R == 1) return at(1).minus(at(2)).half();
    if constexpr (R == 2) return at(3).plus(at(1).plus(at(2)).half());
}

// Row R of G and of A'.
template <class V, int R, class At>
V weight_row(At at) {
    if constexpr (R == 0) return at(0);
    if constexpr (R == 1) return at(0).plus(at(2)).plus(at(1)).half();
    if constexpr (R == 2) return at(0).plus(at(2)).minus(at(1)).half();
    if constexpr (R == 3) return at(2);
}

template <class V, int R, class At>
V target_row(At at) {
    if constexpr (R == 0) return at(0).plus(at(1)).plus(at(2));
    if constexpr (R == 1) return at(1).minus(at(2)).minus(at(3));
}

template <class V, class S, int FIRST, int LAST>
void winograd_source_rows(const WinogradSourceArgs<typename V::T>& a) {
    using T = typename V::T;
    constexpr int W = V::width, GROUP = LANES * W;
    const S* pixel[4][4];
    for (int y = 0; y < 4; ++y)
        for (int x = 0; x < 4; ++x) {
            const int32_t row = a.halo[y * a.halo_row + x];
            pixel[y][x] = static_cast<const S*>(row < 0 ? a.zeros : a.source) + (row < 0 ? 0 : row * a.source_stride);
        }
    auto channels = [&](int64_t c, auto load) {
        V d[4][4];
        for (int y = 0; y < 4; ++y)
            for (int x = 0; x < 4; ++x) d[y][x] = load(pixel[y][x] + c);
        T* out = a.out + c / GROUP * a.group + c % GROUP;
        auto row = [&](auto r) {
            constexpr int R = decltype(r)::value;
            if constexpr (R >= FIRST && R < LAST) {
                V e[4];
                for (int x = 0; x < 4; ++x) e[x] = source_row<V, R>([&](int y) { return d[y][x]; });
                auto at = [&](int x) { return e[x]; };
                T* to = out + (R - FIRST) * 4 * a.component;
                source_row<V, 0>(at).store(to);
                source_row<V, 1>(at).store(to + a.component);
                source_row<V, 2>(at).store(to + 2 * a.component);
                source_row<V, 3>(at).store(to + 3 * a.component);
            }
        };
        row(Int<0>{});
        row(Int<1>{});
        row(Int<2>{});
        row(Int<3>{});
    };
    int64_t c = 0;
    for (; c + W <= a.channels; c += W) channels(c, [](const S* p) { return V::load(p); });
    const int tail = int(a.channels - c);
    if (tail > 0) channels(c, [tail](const S* p) { return V::load(p, tail); });
}

template <class V, class S>
void winograd_source(const WinogradSourceArgs<typename V::T>& a) {
    if (a.last - a.first == 4) return winograd_source_rows<V, S, 0, 4>(a);
    if (a.first == 0) return winograd_source_rows<V, S, 0, 1>(a);
    if (a.first == 1) return winograd_source_rows<V, S, 1, 2>(a);
    if (a.first == 2) return winograd_source_rows<V, S, 2, 3>(a);
    winograd_source_rows<V, S, 3, 4>(a);
}

template <class V>
void winograd_weight(const WinogradWeightArgs<typename V::T>& a) {
    using T = typename V::T;
    constexpr int W = V::width;
    const int64_t size = a.depth * LANES * W;
    for (int64_t i = 0; i < size; i += W) {
        V e[4][3];
        for (int x = 0; x < 3; ++x) {
            auto at = [&](int y) { return V::load(a.from + (y * 3 + x) * size + i); };
            e[0][x] = weight_row<V, 0>(at);
            e[1][x] = weight_row<V, 1>(at);
            e[2][x] = weight_row<V, 2>(at);
            e[3][x] = weight_row<V, 3>(at);
        }
        for (int y = 0; y < 4; ++y) {
            auto at = [&](int x) { return e[y][x]; };
            T* to = a.to + y * 4 * size + i;
            weight_row<V, 0>(at).store(to);
            weight_row<V, 1>(at).store(to + size);
            weight_row<V, 2>(at).store(to + 2 * size);
            weight_row<V, 3>(at).store(to + 3 * size);
        }
    }
}

template <class V, class S>
void winograd_target(const WinogradTargetArgs<typename V::T>& a) {
    using T = typename V::T;
    constexpr int W = V::width;
    for (int64_t i = 0; i < a.count; ++i)
        for (int32_t n = 0; n < a.columns; n += W) {
            const int tail = least(W, a.columns - n);
            const T* from = a.sums + i * LANES * W + n;
            V e[2][4];
            for (int x = 0; x < 4; ++x) {
                auto at = [&](int y) { return V::load(from + (y * 4 + x) * a.component); };
                e[0][x] = target_row<V, 0>(at);
                e[1][x] = target_row<V, 1>(at);
            }
            const V start = a.bias == nullptr ? V::zero() : V::load(a.bias + n, tail);
            for (int y = 0; y < 2; ++y) {
                auto at = [&](int x) { return e[y][x]; };
                S* to = static_cast<S*>(a.target) + (a.at[i] + y * a.pitch) * a.target_stride + n;
                target_row<V, 0>(at).plus(start).store(to, tail);
                target_row<V, 1>(at).plus(start).store(to + a.target_stride, tail);
            }
        }
}

template <class V, class S, int R>
void winograd_gradient_row(const WinogradGradientArgs<typename V::T>& a) {
    using T = typename V::T;
    constexpr int W = V::width;
    for (int64_t i = 0; i < a.count; ++i) {
        V e[2];
        for (int x = 0; x < 2; ++x)
            e[x] = gradient_row<V, R>([&](int y) {
                const int64_t row = a.at[i] + y * a.pitch + x;
                return V::load(static_cast<const S*>(a.target) + row * a.target_stride, a.columns);
            });
        auto at = [&](int x) { return e[x]; };
        T* to = a.out + i * W;
        gradient_row<V, 0>(at).store(to);
        gradient_row<V, 1>(at).store(to + a.component);
        gradient_row<V, 2>(at).store(to + 2 * a.component);
        gradient_row<V, 3>(at).store(to + 3 * a.component);
    }
}

template <class V, class S>
void winograd_gradient(const WinogradGradientArgs<typename V::T>& a) {
    if (a.row == 0) return winograd_gradient_row<V, S, 0>(a);
    if (a.row == 1) return winograd_gradient_row<V, S, 1>(a);
    if (a.row == 2) return winograd_gradient_row<V, S, 2>(a);
    winograd_gradient_row<V, S, 3>(a);
}

template <class V, class S>
void winograd_wgrad(const WinogradWgradArgs<typename V::T>& a) {
    constexpr int W = V::width;
    for (int64_t k = 0; k < a.channels; k += W) {
        const int tail = least(W, a.channels - k);
        V e[3][4];
        for (int x = 0; x < 4; ++x) {
            auto at = [&](int y) { return V::load(a.sums + (y * 4 + x) * a.component + k, tail); };
            e[0][x] = wgrad_row<V, 0>(at);
            e[1][x] = wgrad_row<V, 1>(at);
            e[2][x] = wgrad_row<V, 2>(at);
        }
        for (int y = 0; y < 3; ++y) {
            auto at = [&](int x) { return e[y][x]; };
            S* to = static_cast<S*>(a.weight) + y * a.stride[0] + k;
            wgrad_row<V, 0>(at).store(to, tail);
            wgrad_row<V, 1>(at).store(to + a.stride[1], tail);
            wgrad_row<V, 2>(at).store(to + 2 * a.stride[1], tail);
        }
    }
}
