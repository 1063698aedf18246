// Packing of weights into panels. Included once per instruction set, inside namespace {}.

template <class V>
void pack(const PackArgs<typename V::T>& a) {
    using T = typename V::T;
    constexpr int COLUMNS = LANES * V::width;
    const int taps = a.kernel[0] * a.kernel[1];
    for (int tap = 0; tap < taps; ++tap) {
        const T* weight = a.weight + tap / a.kernel[1] * a.stride[2] + tap % a.kernel[1] * a.stride[3];
        T* panel = a.panel + tap * a.depth * COLUMNS;
        for (int64_t k = 0; k < a.depth; ++k) {
            for (int n = 0; n < a.columns; ++n) panel[k * COLUMNS + n] = weight[k * a.stride[1] + n * a.stride[0]];
            for (int n = a.columns; n < COLUMNS; ++n) panel[k * COLUMNS + n] = 0;
        }
    }
}
