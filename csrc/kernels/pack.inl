// Packing of weights into panels. Included once per instruction set, inside a namespace.
// Weights are stored as S, which is V's own type or bfloat16, and widened on the way.

template <class T>
T widen(T x) {
    return x;
}

inline float widen(Bf16 x) { return from_bf16(x); }

template <class T, class S>
const S* weights_of(const PackArgs<T>& a, int tap) {
    return static_cast<const S*>(a.weight) + tap / a.kernel[1] * a.stride[2] + tap % a.kernel[1] * a.stride[3];
}

// Any strides, element by element: the reference, and the only form that double needs.
template <class V, class S>
void pack_any(const PackArgs<typename V::T>& a) {
    using T = typename V::T;
    constexpr int COLUMNS = LANES * V::width;
    const int taps = a.kernel[0] * a.kernel[1];
    for (int tap = 0; tap < taps; ++tap) {
        const S* weight = weights_of<T, S>(a, tap);
        T* panel = a.panel + tap * a.depth * COLUMNS;
        for (int64_t k = 0; k < a.depth; ++k) {
            for (int n = 0; n < a.columns; ++n)
                panel[k * COLUMNS + n] = widen(weight[k * a.stride[1] + n * a.stride[0]]);
            for (int n = a.columns; n < COLUMNS; ++n) panel[k * COLUMNS + n] = 0;
        }
    }
}

// Columns adjacent in memory (an input gradient of channels_last weights): whole rows are copied.
template <class V, class S>
void pack_rows(const PackArgs<typename V::T>& a) {
    using T = typename V::T;
    constexpr int W = V::width, COLUMNS = LANES * W, LINE = 64;
    constexpr int64_t AHEAD = 16;  // rows: each lies on its own page, so the processor prefetches nothing by itself
    const int taps = a.kernel[0] * a.kernel[1];
    for (int tap = 0; tap < taps; ++tap) {
        const S* weight = weights_of<T, S>(a, tap);
        T* panel = a.panel + tap * a.depth * COLUMNS;
        for (int64_t k = 0; k < a.depth; ++k, panel += COLUMNS) {
            const S* row = weight + k * a.stride[1];
            const int64_t next = least(k + AHEAD, a.depth - 1);
            for (int n = 0; n < COLUMNS; n += LINE / int(sizeof(S)))
                __builtin_prefetch(weight + next * a.stride[1] + n);
            if (a.columns == COLUMNS) {
                for (int n = 0; n < LANES; ++n) V::load(row + n * W).store(panel + n * W);
            } else {
                for (int n = 0; n < LANES; ++n) V::load(row + n * W, clamp(a.columns - n * W, W)).store(panel + n * W);
            }
        }
    }
}

// Columns far apart, but each contiguous over `run` elements of which element j belongs to panel row place(j):
// square blocks are transposed in registers.
template <class V, class S, class Place>
void pack_transposed(const PackArgs<typename V::T>& a, const S* weight, int64_t run, Place place) {
    constexpr int W = V::width;
    for (int n = 0; n < LANES * W; n += W) {
        const int columns = clamp(a.columns - n, W);
        for (int64_t j = 0; j < run; j += W) {
            const int count = least(W, run - j);
            V block[W];
            for (int i = 0; i < W; ++i) {
                const S* from = weight + (n + i) * a.stride[0] + j;
                if (i >= columns) block[i] = V::zero();
                else block[i] = count == W ? V::load(from) : V::load(from, count);
            }
            V::transpose(block);
            for (int i = 0; i < count; ++i) block[i].store(a.panel + place(j + i) * (LANES * W) + n);
        }
    }
}

template <class V, class S>
void pack(const PackArgs<typename V::T>& a) {
    using T = typename V::T;
    const int taps = a.kernel[0] * a.kernel[1];
    if (a.stride[0] == 1) {
        pack_rows<V, S>(a);
    } else if (a.stride[1] == 1) {
        for (int tap = 0; tap < taps; ++tap)
            pack_transposed<V>(a, weights_of<T, S>(a, tap), a.depth, [&](int64_t k) { return tap * a.depth + k; });
    } else if (a.stride[3] == 1 && a.stride[2] == a.kernel[1] && a.stride[1] == taps) {
        pack_transposed<V>(a, weights_of<T, S>(a, 0), a.depth * taps,
                           [&](int64_t j) { return j % taps * a.depth + j / taps; });
    } else {
        pack_any<V, S>(a);
    }
}
