// Inner loops for one instruction set; included by loops_<set>.cpp inside a namespace of its own.
//
// Sums keep LANES running totals, so that compilers may use vectors without changing the order of addition.

constexpr int LANES = 16;

inline std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

struct Float32 {
    using Stored = float;
    static float load(const float& x) { return x; }
    static void store(float x, float& to) { to = x; }
};

struct Bfloat16 {
    using Stored = std::uint16_t;
    static float load(const std::uint16_t& x) { return float_of(std::uint32_t(x) << 16); }
    static void store(float x, std::uint16_t& to) {
        const std::uint32_t bits = bits_of(x);
        const std::uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
        to = std::uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
    }
};

struct Float16 {
    using Stored = std::uint16_t;
    static float load(const std::uint16_t& x) {
        const std::uint32_t sign = std::uint32_t(x & 0x8000) << 16, rest = x & 0x7FFF;
        // normal numbers and infinity by shifting the exponent, subnormal ones by their value
        const std::uint32_t normal = (rest << 13) + (rest >= 0x7C00 ? 224u << 23 : 112u << 23);
        const std::uint32_t small = bits_of(float(rest) * 5.9604644775390625e-8f);
        return float_of(sign | (rest < 0x400 ? small : normal));
    }
    static void store(float x, std::uint16_t& to) {
        const std::uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7FFFFFFF;
        const std::uint32_t normal = ((rest + 0xFFF + ((rest >> 13) & 1)) >> 13) - (112u << 10);
        // at 0.5 neighbouring fp32 numbers are as far apart as the smallest fp16 numbers
        const std::uint32_t small = bits_of(float_of(rest) + 0.5f) - 0x3F000000;
        const std::uint32_t size = rest > 0x7F800000 ? 0x7E00
                                   : rest >= 0x477FF000 ? 0x7C00
                                   : rest < 0x38800000  ? small
                                                        : normal;
        to = std::uint16_t(sign | size);
    }
};

template <class T>
void load_as(const void* from, float* __restrict to, Size n) {
    const auto* __restrict x = static_cast<const typename T::Stored*>(from);
    for (Size i = 0; i < n; ++i) to[i] = T::load(x[i]);
}

template <class T>
void store_as(const float* __restrict from, void* to, Size n) {
    auto* __restrict y = static_cast<typename T::Stored*>(to);
    for (Size i = 0; i < n; ++i) T::store(from[i], y[i]);
}

#ifdef __F16C__
inline void load_half(const void* from, float* to, Size n) {
    const auto* x = static_cast<const std::uint16_t*>(from);
    Size i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
    load_as<Float16>(x + i, to + i, n - i);
}

inline void store_half(const float* from, void* to, Size n) {
    auto* y = static_cast<std::uint16_t*>(to);
    Size i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    store_as<Float16>(from + i, y + i, n - i);
}
#else
inline void load_half(const void* from, float* to, Size n) { load_as<Float16>(from, to, n); }
inline void store_half(const float* from, void* to, Size n) { store_as<Float16>(from, to, n); }
#endif

void load(const void* from, Dtype dtype, float* to, Size n) {
    if (dtype == Dtype::bfloat16) return load_as<Bfloat16>(from, to, n);
    if (dtype == Dtype::float16) return load_half(from, to, n);
    std::memcpy(to, from, n * 4);
}

void store(const float* from, void* to, Dtype dtype, Size n) {
    if (dtype == Dtype::bfloat16) return store_as<Bfloat16>(from, to, n);
    if (dtype == Dtype::float16) return store_half(from, to, n);
    std::memcpy(to, from, n * 4);
}

// The number of terms is a constant, so that a term costs one multiplication and one addition in registers.
template <class T, int COUNT, bool BASE>
void map_terms(const void* const* inputs, const float* c, float factor, void* output, Size n) {
    const typename T::Stored* x[COUNT];
    float k[COUNT];
    for (int t = 0; t < COUNT; ++t) {
        x[t] = static_cast<const typename T::Stored*>(inputs[t]);
        k[t] = c[t];
    }
    auto* y = static_cast<typename T::Stored*>(output);
    // outputs may be inputs, element by element
#pragma GCC ivdep
    for (Size i = 0; i < n; ++i) {
        float sum = BASE ? T::load(x[0][i]) : 0.0f;
        for (int t = BASE ? 1 : 0; t < COUNT; ++t) sum += k[t] * T::load(x[t][i]);
        T::store(BASE ? sum : factor * sum, y[i]);
    }
}

template <class T, bool BASE>
bool map_counted(const void* const* x, const float* c, int count, float factor, void* y, Size n) {
    switch (count) {
        case 1: map_terms<T, 1, BASE>(x, c, factor, y, n); return true;
        case 2: map_terms<T, 2, BASE>(x, c, factor, y, n); return true;
        case 3: map_terms<T, 3, BASE>(x, c, factor, y, n); return true;
        case 4: map_terms<T, 4, BASE>(x, c, factor, y, n); return true;
        case 5: map_terms<T, 5, BASE>(x, c, factor, y, n); return true;
        case 6: map_terms<T, 6, BASE>(x, c, factor, y, n); return true;
        case 7: map_terms<T, 7, BASE>(x, c, factor, y, n); return true;
        case 8: map_terms<T, 8, BASE>(x, c, factor, y, n); return true;
        case 9: map_terms<T, 9, BASE>(x, c, factor, y, n); return true;
        default: return false;
    }
}

void scale(const float* __restrict x, float c, float* __restrict y, Size n) {
    for (Size i = 0; i < n; ++i) y[i] = 0.0f + c * x[i];
}

void add_scaled(const float* __restrict x, float c, float* __restrict y, Size n) {
    for (Size i = 0; i < n; ++i) y[i] += c * x[i];
}

void multiply(float* y, float c, Size n) {
    for (Size i = 0; i < n; ++i) y[i] = c * y[i];
}

void gate(const float* __restrict x, const float* __restrict g, float* __restrict y, Size n) {
    for (Size i = 0; i < n; ++i) y[i] = x[i] + g[i] * y[i];
}

void subtract(const float* __restrict x, const float* __restrict z, float* __restrict y, Size n) {
    for (Size i = 0; i < n; ++i) y[i] = x[i] - z[i];
}

void map_same(const void* const* x, const float* c, int count, bool base, float factor, void* y, Dtype dtype, Size n) {
    if (dtype == Dtype::bfloat16)
        base ? map_counted<Bfloat16, true>(x, c, count, factor, y, n)
             : map_counted<Bfloat16, false>(x, c, count, factor, y, n);
    else if (dtype == Dtype::float32)
        base ? map_counted<Float32, true>(x, c, count, factor, y, n)
             : map_counted<Float32, false>(x, c, count, factor, y, n);
    else
        base ? map_counted<Float16, true>(x, c, count, factor, y, n)
             : map_counted<Float16, false>(x, c, count, factor, y, n);
}

bool has_bad(const float* x, Size n) {
    std::uint32_t bad = 0;
    for (Size i = 0; i < n; ++i) bad |= (bits_of(x[i]) & 0x7FFFFFFF) >= 0x7F800000 ? 1 : 0;
    return bad != 0;
}

template <int COUNT>
struct Totals {
    float lane[COUNT][LANES] = {};
    void add_to(double* sums) const {
        for (int s = 0; s < COUNT; ++s) {
            double total = 0;
            for (int j = 0; j < LANES; ++j) total += lane[s][j];
            sums[s] += total;
        }
    }
};

void pair_sums(const float* a, const float* b, Size n, double* sums) {
    Totals<7> t;
    float peak[LANES] = {};
    auto step = [&](Size i, int j) {
        const float d = a[i] - b[i], size = std::fabs(d);
        t.lane[0][j] += size;
        t.lane[1][j] += std::fabs(a[i]);
        t.lane[2][j] += std::fabs(b[i]);
        t.lane[3][j] += d * d;
        t.lane[4][j] += a[i] * a[i];
        t.lane[5][j] += b[i] * b[i];
        t.lane[6][j] += a[i] * b[i];
        peak[j] = peak[j] < size ? size : peak[j];
    };
    Size i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; ++j) step(i + j, j);
    for (int j = 0; i < n; ++i, ++j) step(i, j);
    t.add_to(sums);
    for (float p : peak) sums[7] = sums[7] < p ? double(p) : sums[7];
    // a maximum drops NaN, which must never look like a small difference; the sum keeps it
    if (std::isnan(sums[0])) sums[7] = sums[0];
}

void norms(const float* x, Size n, double* sums) {
    Totals<2> t;
    auto step = [&](Size i, int j) {
        t.lane[0][j] += std::fabs(x[i]);
        t.lane[1][j] += x[i] * x[i];
    };
    Size i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; ++j) step(i + j, j);
    for (int j = 0; i < n; ++i, ++j) step(i, j);
    t.add_to(sums);
}

template <int COUNT>
void error_of(const float* const* x, const float* c, const float* t, Size n, double* sums) {
    const float* p[COUNT];
    float k[COUNT];
    for (int s = 0; s < COUNT; ++s) {
        p[s] = x[s];
        k[s] = c[s];
    }
    Totals<2> totals;
    auto step = [&](Size i, int j) {
        float e = k[0] * p[0][i];
        for (int s = 1; s < COUNT; ++s) e += k[s] * p[s][i];
        e -= t[i];
        totals.lane[0][j] += std::fabs(e);
        totals.lane[1][j] += e * e;
    };
    Size i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; ++j) step(i + j, j);
    for (int j = 0; i < n; ++i, ++j) step(i, j);
    totals.add_to(sums);
}

void error_norms(const float* const* x, const float* c, int count, const float* t, Size n, double* sums) {
    if (count == 0) return norms(t, n, sums);
    if (count == 1) return error_of<1>(x, c, t, n, sums);
    if (count == 2) return error_of<2>(x, c, t, n, sums);
    float e[CHUNK];
    for (Size i = 0; i < n; ++i) e[i] = c[0] * x[0][i];
    for (int s = 1; s < count; ++s) add_scaled(x[s], c[s], e, n);
    for (Size i = 0; i < n; ++i) e[i] -= t[i];
    norms(e, n, sums);
}

double dot(const float* a, const float* b, Size n) {
    Totals<1> t;
    Size i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; ++j) t.lane[0][j] += a[i + j] * b[i + j];
    for (int j = 0; i < n; ++i, ++j) t.lane[0][j] += a[i] * b[i];
    double sum = 0;
    t.add_to(&sum);
    return sum;
}

float peak(const float* x, Size n) {
    // as integers, the order of sizes is that of numbers; NaN is left out
    std::uint32_t most = 0;
    for (Size i = 0; i < n; ++i) {
        const std::uint32_t size = bits_of(x[i]) & 0x7FFFFFFF;
        const std::uint32_t counted = size > 0x7F800000 ? 0 : size;
        most = most < counted ? counted : most;
    }
    return float_of(most);
}

void encode(const float* __restrict x, float inverse, std::uint8_t* __restrict codes, Size n) {
    for (Size i = 0; i < n; ++i) {
        const float scaled = x[i] * inverse;
        const std::uint32_t bits = bits_of(scaled), size = bits & 0x7FFFFFFF;
        const std::uint32_t normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120u << 3);
        const std::uint32_t capped = normal > 126 ? 126 : normal;
        // at 16384 neighbouring fp32 numbers are as far apart as the smallest e4m3 numbers
        const std::uint32_t small = bits_of(float_of(size) + 16384.0f) - 0x46800000;
        codes[i] = std::uint8_t((size < 0x3C800000 ? small : capped) | ((bits >> 24) & 0x80));
    }
}

void decode(const std::uint8_t* __restrict codes, float scale, float* __restrict x, Size n) {
    for (Size i = 0; i < n; ++i) {
        const std::uint32_t code = codes[i], rest = code & 127;
        const std::uint32_t small = bits_of(float(rest & 7) * 0.001953125f);
        const std::uint32_t size = rest < 8 ? small : (rest << 20) + (120u << 23);
        x[i] = float_of(size | ((code & 128) << 24)) * scale;
    }
}

const Loops table{NAME,     load,     store,     map_same, scale,       add_scaled, multiply, gate,  subtract,
                  has_bad,  pair_sums, norms,    error_norms, dot,     peak,       encode,   decode};
