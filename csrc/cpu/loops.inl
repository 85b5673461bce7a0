// Inner loops for one instruction set; included by loops_<set>.cpp inside a namespace of its own.
//
// Sums keep LANES running totals, so that compilers may use vectors without changing the order of addition. One file,
// longer than others, because every instruction set compiles all of it.

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

// a b + c for sums, whose last bit nobody compares; elementwise results round every product.
inline float fused(float a, float b, float c) {
#ifdef HAS_FMA_AND_F16C
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// A dtype that loops work on in place. `Packed` is what a vector of 32 bits holds: one number, or two neighbours, which
// are taken apart and joined again with less work than vectors of 16 bits take to be widened and narrowed. A pair begins
// where a number may; its type says so, which a pointer of type auto* would drop. What is written is `Written`: were it
// allowed to alias everything, no loop could keep its pointers in registers.
struct Float32 {
    using Stored = float;
    using Packed = float;
    using Written = float;
    static constexpr int PACK = 1;
    static float load(float x) { return x; }
    static void store(float x, float& to) { to = x; }
    static float take(float x, int) { return x; }
    static float rounded(float x) { return x; }
    static float join(const float* rounded) { return rounded[0]; }
};

struct Bfloat16 {
    using Stored = std::uint16_t;
    typedef std::uint32_t Packed __attribute__((aligned(2), may_alias));
    typedef std::uint32_t Written __attribute__((aligned(2)));
    static constexpr int PACK = 2;
    static float load(std::uint16_t x) { return float_of(std::uint32_t(x) << 16); }
    static void store(float x, std::uint16_t& to) { to = std::uint16_t(bits_of(rounded(x)) >> 16); }
    static float take(std::uint32_t pair, int which) { return float_of(which ? pair & 0xFFFF0000 : pair << 16); }
    static float rounded(float x) {
        const std::uint32_t bits = bits_of(x);
        return float_of((x != x ? 0x7FC00000 : bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000);
    }
    static std::uint32_t join(const float* rounded) { return (bits_of(rounded[0]) >> 16) | bits_of(rounded[1]); }
};

// Where numbers come from bf16 numbers and finite or canonical coefficients alone, NaN needs no look: it has no bits among
// those that rounding drops, which could carry over and make it another number.
struct PlainBfloat16 : Bfloat16 {
    static float rounded(float x) {
        const std::uint32_t bits = bits_of(x);
        return float_of((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000);
    }
};
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first of a pair is taken to be its lower half");

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

// Bytes that a loop is behind the memory it asks for.
constexpr Size AHEAD = 2048;

// Calls work(i) for every number, and asks for the memory ahead of those that are read, a line at a time.
template <class Stored, class Work>
inline __attribute__((always_inline)) void for_lines(const Stored* from, Size n, Work&& work) {
    constexpr Size LINE = 64 / sizeof(Stored);
    Size i = 0;
    for (; i + LINE <= n; i += LINE) {
        __builtin_prefetch(reinterpret_cast<const char*>(from + i) + AHEAD, 0, 3);
        VECTOR_LOOP
        for (Size j = 0; j < LINE; ++j) work(i + j);
    }
    for (; i < n; ++i) work(i);
}

template <class T>
void load_as(const void* from, float* __restrict to, Size n) {
    const auto* __restrict x = static_cast<const typename T::Stored*>(from);
    for_lines(x, n, [&](Size i) __attribute__((always_inline)) { to[i] = T::load(x[i]); });
}

template <class T>
void store_as(const float* __restrict from, void* to, Size n) {
    auto* __restrict y = static_cast<typename T::Stored*>(to);
    for (Size i = 0; i < n; ++i) T::store(from[i], y[i]);
}

#ifdef HAS_FMA_AND_F16C
inline void load_half(const void* from, float* to, Size n) {
    const auto* x = static_cast<const std::uint16_t*>(from);
    Size i = 0;
    for (; i + 8 <= n; i += 8) {
        if (i % 32 == 0) __builtin_prefetch(reinterpret_cast<const char*>(x + i) + AHEAD, 0, 3);
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
    }
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

// Where a number stands in tensors of a dtype that are packed in the same way.
template <class T>
struct InPack {
    Size index;
    int which;
    Size place() const { return index * T::PACK + which; }
    Size sorted(Size n) const { return which * (n / T::PACK) + index; }
    float operator()(const void* tensor) const {
        return T::take(static_cast<const typename T::Packed*>(tensor)[index], which);
    }
};

template <class T>
struct Alone {
    Size index;
    static constexpr int which = 0;
    Size place() const { return index; }
    Size sorted(Size n) const {
        const Size packs = n / T::PACK;
        return index < packs * T::PACK ? index % T::PACK * packs + index / T::PACK : index;
    }
    float operator()(const void* tensor) const { return T::load(static_cast<const typename T::Stored*>(tensor)[index]); }
};

// Tensors whose memory a loop asks for some way ahead of where it reads, a line of each at a time. What a processor fetches
// by itself comes too late for loops that do little with it; and many lines at once, as of a whole chunk, would leave no
// room for those that are read now.
template <int COUNT>
struct Ahead {
    const void* tensors[COUNT];
    Size bytes;
    inline __attribute__((always_inline)) void operator()(Size at) const {
        for (const void* tensor : tensors) __builtin_prefetch(static_cast<const char*>(tensor) + at + bytes, 0, 3);
    }
};

struct NothingAhead {
    void operator()(Size) const {}
};

template <class... Tensors>
inline Ahead<sizeof...(Tensors)> ahead_of(Tensors... tensors) {
    return {{tensors...}, AHEAD};
}

template <int COUNT>
inline Ahead<COUNT> ahead_of_all(const void* const (&tensors)[COUNT], Size bytes = AHEAD) {
    Ahead<COUNT> ahead;
    std::copy(tensors, tensors + COUNT, ahead.tensors);
    ahead.bytes = bytes;
    return ahead;
}

// Calls work(i) for every pack of numbers, sixteen at a time; what is written at one is read at no other.
template <class Pack, class Work, class Come>
inline __attribute__((always_inline)) void for_packs(Size packs, Work&& work, const Come& come) {
    Size i = 0;
    for (; i + LANES <= packs; i += LANES) {
        come(i * Size(sizeof(Pack)));
        VECTOR_LOOP
        for (int j = 0; j < LANES; ++j) work(i + j);
    }
    for (; i < packs; ++i) work(i);
}

// Writes value(at), rounded, for every place; what is written at one is read at no other.
template <class T, class Value, class Come = NothingAhead>
inline __attribute__((always_inline)) void write_each(void* output, Size n, Value&& value, const Come& come = {}) {
    const auto work = [&](Size i) __attribute__((always_inline)) {
        float y[T::PACK];
        for (int w = 0; w < T::PACK; ++w) y[w] = T::rounded(value(InPack<T>{i, w}));
        static_cast<typename T::Written*>(output)[i] = T::join(y);
    };
    for_packs<typename T::Packed>(n / T::PACK, work, come);
    for (Size i = n / T::PACK * T::PACK; i < n; ++i)
        T::store(value(Alone<T>{i}), static_cast<typename T::Stored*>(output)[i]);
}

// The same for two outputs: value(at, y, z) sets both.
template <class T, class Value, class Come>
inline __attribute__((always_inline)) void write_two(void* output, void* other, Size n, Value&& value, const Come& come) {
    const auto work = [&](Size i) __attribute__((always_inline)) {
        float y[T::PACK], z[T::PACK];
        for (int w = 0; w < T::PACK; ++w) {
            value(InPack<T>{i, w}, y[w], z[w]);
            y[w] = T::rounded(y[w]);
            z[w] = T::rounded(z[w]);
        }
        static_cast<typename T::Written*>(output)[i] = T::join(y);
        static_cast<typename T::Written*>(other)[i] = T::join(z);
    };
    for_packs<typename T::Packed>(n / T::PACK, work, come);
    for (Size i = n / T::PACK * T::PACK; i < n; ++i) {
        float y, z;
        value(Alone<T>{i}, y, z);
        T::store(y, static_cast<typename T::Stored*>(output)[i]);
        T::store(z, static_cast<typename T::Stored*>(other)[i]);
    }
}

// Calls step(at, lane) for every place, sixteen lanes at a time; what is written at one is read at no other. Sixteen
// lanes are one line of a cache.
template <class T, class Step, class Come = NothingAhead>
inline __attribute__((always_inline)) void in_lanes(Size n, Step&& step, const Come& come = {}) {
    Size i = 0;
    for (; i + LANES <= n / T::PACK; i += LANES) {
        come(i * Size(sizeof(typename T::Packed)));
        VECTOR_LOOP
        for (int j = 0; j < LANES; ++j)
            for (int w = 0; w < T::PACK; ++w) step(InPack<T>{i + j, w}, j);
    }
    for (Size k = i * T::PACK; k < n; ++k) step(Alone<T>{k}, static_cast<int>(k % LANES));
}

// The same, and writes what step returns, which is rounded already.
template <class T, class Step, class Come>
inline __attribute__((always_inline)) void write_in_lanes(void* output, Size n, Step&& step, const Come& come) {
    Size i = 0;
    for (; i + LANES <= n / T::PACK; i += LANES) {
        come(i * Size(sizeof(typename T::Packed)));
        VECTOR_LOOP
        for (int j = 0; j < LANES; ++j) {
            float y[T::PACK];
            for (int w = 0; w < T::PACK; ++w) y[w] = step(InPack<T>{i + j, w}, j);
            static_cast<typename T::Written*>(output)[i + j] = T::join(y);
        }
    }
    for (Size k = i * T::PACK; k < n; ++k)
        T::store(step(Alone<T>{k}, static_cast<int>(k % LANES)), static_cast<typename T::Stored*>(output)[k]);
}

// The number of terms is a constant, so that a term costs one multiplication and one addition in registers.
template <class T, int COUNT, bool BASE, bool GATED, bool SCALED>
void map_terms(const void* const* inputs, const float* c, float factor, const void* gates, void* output, Size n) {
    static_assert(COUNT > 1 || !GATED);
    constexpr int START = GATED ? 1 : 0;
    const void* x[COUNT];
    float k[COUNT];
    for (int t = 0; t < COUNT; ++t) {
        x[t] = inputs[t];
        k[t] = c[t];
    }
    write_each<T>(output, n, [&](auto at) __attribute__((always_inline)) {
        float sum = BASE && !GATED ? at(x[0]) : k[START] * at(x[START]);
        for (int t = START + 1; t < COUNT; ++t) sum += k[t] * at(x[t]);
        if (GATED) sum = at(x[0]) + at(gates) * sum;
        return SCALED ? factor * sum : sum;
    }, ahead_of_all(x));
}

template <class T, bool BASE, bool GATED, bool SCALED>
void map_counted(const void* const* x, const float* c, int count, float factor, const void* gate, void* y, Size n) {
    switch (count) {
        case 1:  // a gate has something to multiply
            if constexpr (!GATED) map_terms<T, 1, BASE, GATED, SCALED>(x, c, factor, gate, y, n);
            return;
        case 2: return map_terms<T, 2, BASE, GATED, SCALED>(x, c, factor, gate, y, n);
        case 3: return map_terms<T, 3, BASE, GATED, SCALED>(x, c, factor, gate, y, n);
        case 4: return map_terms<T, 4, BASE, GATED, SCALED>(x, c, factor, gate, y, n);
        case 5: return map_terms<T, 5, BASE, GATED, SCALED>(x, c, factor, gate, y, n);
        case 6: return map_terms<T, 6, BASE, GATED, SCALED>(x, c, factor, gate, y, n);
        case 7: return map_terms<T, 7, BASE, GATED, SCALED>(x, c, factor, gate, y, n);
        case 8: return map_terms<T, 8, BASE, GATED, SCALED>(x, c, factor, gate, y, n);
        case 9: return map_terms<T, 9, BASE, GATED, SCALED>(x, c, factor, gate, y, n);
        default: return;
    }
}

template <class T>
void map_of(const void* const* x, const float* c, int count, bool base, float factor, const void* gate, void* y,
            Size n) {
    if (gate != nullptr) return map_counted<T, true, true, false>(x, c, count, factor, gate, y, n);
    if (base) return map_counted<T, true, false, false>(x, c, count, factor, gate, y, n);
    if (factor != 1.0f) return map_counted<T, false, false, true>(x, c, count, factor, gate, y, n);
    map_counted<T, false, false, false>(x, c, count, factor, gate, y, n);
}

void map(const void* const* x, const float* c, int count, bool base, float factor, const void* gate, void* y,
         Dtype dtype, Size n) {
    dtype == Dtype::bfloat16 ? map_of<PlainBfloat16>(x, c, count, base, factor, gate, y, n)
                             : map_of<Float32>(x, c, count, base, factor, gate, y, n);
}

template <class T, int COUNT, int FEWER>
void two_of(const void* const* inputs, const Weights& few, const Weights& all, Size n) {
    const void* x[COUNT];
    float k[FEWER], l[COUNT];
    for (int t = 0; t < COUNT; ++t) {
        x[t] = inputs[t];
        l[t] = all.coefficients[t];
    }
    for (int t = 0; t < FEWER; ++t) k[t] = few.coefficients[t];
    const float factor = few.factor, other = all.factor;
    write_two<T>(few.output, all.output, n, [&](auto at, float& y, float& z) __attribute__((always_inline)) {
        const float first = at(x[0]);
        float sum = k[0] * first, total = l[0] * first;
        for (int t = 1; t < COUNT; ++t) {
            const float value = at(x[t]);
            if (t < FEWER) sum += k[t] * value;
            total += l[t] * value;
        }
        y = factor * sum;
        z = other * total;
    }, ahead_of_all(x));
}

template <class T, int COUNT>
void two_counted(const void* const* x, int fewer, const Weights& few, const Weights& all, Size n) {
    fewer == COUNT ? two_of<T, COUNT, COUNT>(x, few, all, n) : two_of<T, COUNT, COUNT - 1>(x, few, all, n);
}

template <class T>
void two_as(const void* const* x, int count, int fewer, const Weights& few, const Weights& all, Size n) {
    switch (count) {
        case 2: return two_counted<T, 2>(x, fewer, few, all, n);
        case 3: return two_counted<T, 3>(x, fewer, few, all, n);
        case 4: return two_counted<T, 4>(x, fewer, few, all, n);
        default: return;
    }
}

void map_two(const void* const* x, int count, int fewer, const Weights& few, const Weights& all, Dtype dtype, Size n) {
    dtype == Dtype::bfloat16 ? two_as<PlainBfloat16>(x, count, fewer, few, all, n)
                             : two_as<Float32>(x, count, fewer, few, all, n);
}

void add_scaled(const float* __restrict x, float c, float* __restrict y, Size n) {
    for (Size i = 0; i < n; ++i) y[i] += c * x[i];
}

void subtract(const float* __restrict x, const float* __restrict z, float* __restrict y, Size n) {
    for (Size i = 0; i < n; ++i) y[i] = x[i] - z[i];
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
            float half[LANES / 2];
            for (int j = 0; j < LANES / 2; ++j) half[j] = lane[s][j] + lane[s][j + LANES / 2];
            for (int width = LANES / 4; width > 0; width /= 2)
                for (int j = 0; j < width; ++j) half[j] += half[j + width];
            sums[s] += half[0];
        }
    }
};

// The eight sums of a pair, the last of them if PEAK says so, one element at a time.
template <bool PEAK>
struct PairTotals {
    Totals<7> sums;
    float peak[LANES] = {};

    inline __attribute__((always_inline)) void add(float a, float b, int j) {
        const float d = a - b, size = std::fabs(d);
        sums.lane[0][j] += size;
        sums.lane[1][j] += std::fabs(a);
        sums.lane[2][j] += std::fabs(b);
        sums.lane[3][j] = fused(d, d, sums.lane[3][j]);
        sums.lane[4][j] = fused(a, a, sums.lane[4][j]);
        sums.lane[5][j] = fused(b, b, sums.lane[5][j]);
        sums.lane[6][j] = fused(a, b, sums.lane[6][j]);
        if (PEAK) peak[j] = peak[j] < size ? size : peak[j];
    }

    void add_to(double* totals) const {
        sums.add_to(totals);
        if (!PEAK) return;
        for (float p : peak) totals[7] = totals[7] < p ? double(p) : totals[7];
        // a maximum drops NaN, which must never look like a small difference; the sum keeps it
        if (std::isnan(totals[0])) totals[7] = totals[0];
    }
};

template <class T>
void pair_of(const void* a, const void* b, Size n, double* sums) {
    PairTotals<true> totals;
    in_lanes<T>(n, [&](auto at, int j) __attribute__((always_inline)) { totals.add(at(a), at(b), j); }, ahead_of(a, b));
    totals.add_to(sums);
}

void pair_sums(const void* a, const void* b, Dtype dtype, Size n, double* sums) {
    dtype == Dtype::bfloat16 ? pair_of<Bfloat16>(a, b, n, sums) : pair_of<Float32>(a, b, n, sums);
}

// Subtracts, rounds, stores, and adds up the residual as stored with `other`: the previous residual, which may be
// where the new one goes, or the input.
template <class T, bool LOOK>
bool capture_of(const void* output, const void* input, const void* previous, void* residual, Size n, double* sums) {
    const void* other = previous == nullptr ? input : previous;
    PairTotals<false> totals;
    std::uint32_t bad[LANES] = {};
    write_in_lanes<T>(residual, n, [&](auto at, int j) __attribute__((always_inline)) {
        const float kept = T::rounded(at(output) - at(input));
        totals.add(kept, at(other), j);
        if (LOOK) bad[j] |= (bits_of(kept) & 0x7F800000) == 0x7F800000 ? 1 : 0;
        return kept;
    }, ahead_of(output, input, other));
    totals.add_to(sums);
    std::uint32_t any = 0;
    for (std::uint32_t lane : bad) any |= lane;
    return any != 0;
}

template <class T>
bool capture_as(const void* output, const void* input, const void* previous, void* residual, bool look, Size n,
                double* sums) {
    return look ? capture_of<T, true>(output, input, previous, residual, n, sums)
                : capture_of<T, false>(output, input, previous, residual, n, sums);
}

bool capture(const void* output, const void* input, const void* previous, void* residual, Dtype dtype, bool look,
             Size n, double* sums) {
    return dtype == Dtype::bfloat16 ? capture_as<PlainBfloat16>(output, input, previous, residual, look, n, sums)
                                    : capture_as<Float32>(output, input, previous, residual, look, n, sums);
}

template <class T, int COUNT>
void norms_of(const void* const* inputs, const float* c, Size n, double* sums) {
    const void* x[COUNT];
    float k[COUNT];
    for (int t = 0; t < COUNT; ++t) {
        x[t] = inputs[t];
        k[t] = c[t];
    }
    Totals<2> totals;
    in_lanes<T>(n, [&](auto at, int j) __attribute__((always_inline)) {
        float y = k[0] * at(x[0]);
        for (int t = 1; t < COUNT; ++t) y = fused(k[t], at(x[t]), y);
        totals.lane[0][j] += std::fabs(y);
        totals.lane[1][j] = fused(y, y, totals.lane[1][j]);
    }, ahead_of_all(x));
    totals.add_to(sums);
}

template <class T>
void norms_counted(const void* const* x, const float* c, int count, Size n, double* sums) {
    switch (count) {
        case 1: return norms_of<T, 1>(x, c, n, sums);
        case 2: return norms_of<T, 2>(x, c, n, sums);
        case 3: return norms_of<T, 3>(x, c, n, sums);
        case 4: return norms_of<T, 4>(x, c, n, sums);
        case 5: return norms_of<T, 5>(x, c, n, sums);
        case 6: return norms_of<T, 6>(x, c, n, sums);
        case 7: return norms_of<T, 7>(x, c, n, sums);
        case 8: return norms_of<T, 8>(x, c, n, sums);
        default: return;
    }
}

void norms(const void* const* x, const float* c, int count, Dtype dtype, Size n, double* sums) {
    dtype == Dtype::bfloat16 ? norms_counted<Bfloat16>(x, c, count, n, sums)
                             : norms_counted<Float32>(x, c, count, n, sums);
}

// Adds the lanes of the sums of a few pairings over a part of the chunk to theirs over the parts before.
template <class T, int SETS>
void errors_of(const void* target, const void* common, const Pairing* pairings, Size from, Size n,
               Totals<2>* totals_of) {
    const void* x[SETS];
    float a[SETS], b[SETS];
    for (int s = 0; s < SETS; ++s) {
        x[s] = static_cast<const typename T::Stored*>(pairings[s].other) + from;
        a[s] = pairings[s].of_common;
        b[s] = pairings[s].of_other;
    }
    Totals<2 * SETS> totals;
    in_lanes<T>(n, [&](auto at, int j) __attribute__((always_inline)) {
        const float goal = at(target), c = at(common);
        UNROLLED
        for (int s = 0; s < SETS; ++s) {
            const float e = fused(b[s], at(x[s]), fused(a[s], c, -goal));
            totals.lane[2 * s][j] += std::fabs(e);
            totals.lane[2 * s + 1][j] = fused(e, e, totals.lane[2 * s + 1][j]);
        }
    }, ahead_of_all(x));
    for (int s = 0; s < SETS; ++s)
        for (int j = 0; j < LANES; ++j) {
            totals_of[s].lane[0][j] += totals.lane[2 * s][j];
            totals_of[s].lane[1][j] += totals.lane[2 * s + 1][j];
        }
}

// Part by part, so that target and common term are in the first cache for all pairings.
template <class T>
void errors_as(const void* target, const void* common, const Pairing* pairings, int count, Size n) {
    constexpr int AT_ONCE = 3;  // gcc keeps the totals of more in memory
    constexpr Size PART = 512;
    Totals<2> totals[MOST_PAIRINGS];
    for (Size from = 0; from < n; from += PART) {
        const Size size = std::min(PART, n - from);
        const void* goal = static_cast<const typename T::Stored*>(target) + from;
        const void* first = static_cast<const typename T::Stored*>(common) + from;
        for (int s = 0; s < count; s += AT_ONCE) {
            const int some = std::min(AT_ONCE, count - s);
            const auto run = some == 1 ? errors_of<T, 1> : some == 2 ? errors_of<T, 2> : errors_of<T, 3>;
            run(goal, first, pairings + s, from, size, totals + s);
        }
    }
    for (int s = 0; s < count; ++s) totals[s].add_to(pairings[s].sums);
}

void errors(const void* target, const void* common, const Pairing* pairings, int count, Dtype dtype, Size n) {
    dtype == Dtype::bfloat16 ? errors_as<Bfloat16>(target, common, pairings, count, n)
                             : errors_as<Float32>(target, common, pairings, count, n);
}

template <class T>
bool differences_as(const void* output, const void* input, float* __restrict r, Size n, float& peak) {
    // as integers, the order of sizes is that of numbers; NaN is left out
    std::int32_t most[LANES] = {}, highest[LANES] = {};
    in_lanes<T>(n, [&](auto at, int j) __attribute__((always_inline)) {
        const float d = at(output) - at(input);
        r[at.place()] = d;
        const std::int32_t size = std::int32_t(bits_of(d) & 0x7FFFFFFF);
        const std::int32_t counted = size > 0x7F800000 ? 0 : size;
        most[j] = most[j] < counted ? counted : most[j];
        highest[j] = highest[j] < size ? size : highest[j];
    }, ahead_of(output, input));
    std::int32_t all = 0, top = 0;
    for (std::int32_t lane : most) all = all < lane ? lane : all;
    for (std::int32_t lane : highest) top = top < lane ? lane : top;
    peak = float_of(std::uint32_t(all));
    return top >= 0x7F800000;
}

bool differences(const void* output, const void* input, Dtype dtype, float* r, Size n, float& peak) {
    return dtype == Dtype::bfloat16 ? differences_as<Bfloat16>(output, input, r, n, peak)
                                    : differences_as<Float32>(output, input, r, n, peak);
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
    for_lines(codes, n, [&](Size i) __attribute__((always_inline)) {
        const std::int32_t code = codes[i], rest = code & 127;
        const std::int32_t small = std::int32_t(bits_of(float(rest) * 0.001953125f));
        const std::int32_t normal = (rest << 20) + (120 << 23);
        const std::int32_t choice = -std::int32_t(rest < 8);
        const std::int32_t size = (small & choice) | (normal & ~choice);
        x[i] = float_of(std::uint32_t(size) | (std::uint32_t(code & 128) << 24)) * scale;
    });
}

template <class T, bool GATED, bool RESIDUAL>
void lerp_of(const void* f, const void* c, float beta, const void* g, const void* r, void* o, Size n) {
    // from the nearer end, so that 0 gives c and 1 gives f bit by bit
    const bool near = beta < 0.5f;
    const float weight = near ? beta : beta - 1.0f;
    write_each<T>(o, n, [&](auto at) __attribute__((always_inline)) {
        const float x = at(f), y = at(c);
        float mixed = (near ? y : x) + weight * (x - y);
        if (GATED) mixed = at(g) * mixed;
        if (RESIDUAL) mixed = at(r) + mixed;
        return mixed;
    }, ahead_of(f, c, RESIDUAL ? r : f));
}

template <class T>
void lerp_as(const void* f, const void* c, float beta, const void* g, const void* r, void* o, Size n) {
    if (g == nullptr && r == nullptr) return lerp_of<T, false, false>(f, c, beta, g, r, o, n);
    if (g == nullptr) return lerp_of<T, false, true>(f, c, beta, g, r, o, n);
    if (r == nullptr) return lerp_of<T, true, false>(f, c, beta, g, r, o, n);
    lerp_of<T, true, true>(f, c, beta, g, r, o, n);
}

void lerp(const void* f, const void* c, float beta, const void* g, const void* r, void* o, Dtype dtype, Size n) {
    dtype == Dtype::bfloat16 ? lerp_as<Bfloat16>(f, c, beta, g, r, o, n) : lerp_as<Float32>(f, c, beta, g, r, o, n);
}

template <class T, bool GATED>
double lerp_backward_of(const void* d, const void* f, const void* c, float beta, const void* g, void* o, Size n) {
    Totals<1> totals;
    write_in_lanes<T>(o, n, [&](auto at, int j) __attribute__((always_inline)) {
        const float grad = GATED ? at(g) * at(d) : at(d);
        totals.lane[0][j] = fused(grad, at(f) - at(c), totals.lane[0][j]);
        return T::rounded(beta * grad);
    }, ahead_of(d, f, c));
    double sum = 0;
    totals.add_to(&sum);
    return sum;
}

template <class T>
double lerp_backward_as(const void* d, const void* f, const void* c, float beta, const void* g, void* o, Size n) {
    return g == nullptr ? lerp_backward_of<T, false>(d, f, c, beta, g, o, n)
                        : lerp_backward_of<T, true>(d, f, c, beta, g, o, n);
}

double lerp_backward(const void* d, const void* f, const void* c, float beta, const void* g, void* o, Dtype dtype,
                     Size n) {
    return dtype == Dtype::bfloat16 ? lerp_backward_as<Bfloat16>(d, f, c, beta, g, o, n)
                                    : lerp_backward_as<Float32>(d, f, c, beta, g, o, n);
}

void product(const float* __restrict x, float* __restrict y, Size n) {
    for (Size i = 0; i < n; ++i) y[i] = x[i] * y[i];
}

// Sums of which nothing else is made, in two totals, so that one addition need not wait for the other: of the numbers
// of a pack, or of the halves.
template <class T, class Value, class Come>
inline __attribute__((always_inline)) double sum_each(Size n, Value&& value, const Come& come) {
    Totals<2> totals;
    const Size half = T::PACK == 1 ? n / 2 : 0;
    const auto both = [&](Size at) __attribute__((always_inline)) {
        come(at);
        if (T::PACK == 1) come(at + half * Size(sizeof(float)));
    };
    in_lanes<T>(T::PACK == 1 ? half : n, [&](auto at, int j) __attribute__((always_inline)) {
        float& total = totals.lane[at.which][j];
        total = value(at, total);
        if constexpr (T::PACK == 1) {
            auto further = at;
            further.index += half;
            totals.lane[1][j] = value(further, totals.lane[1][j]);
        }
    }, both);
    if (T::PACK == 1 && n % 2) totals.lane[0][0] = value(Alone<T>{n - 1}, totals.lane[0][0]);
    double halves[2] = {0, 0};
    totals.add_to(halves);
    return halves[0] + halves[1];
}

// A row as it is, x_0 + sum over k >= 1 of c_k x_k, worked out anew wherever a number of it is asked for.
template <class T, int COUNT>
struct RowOf {
    const void* x[COUNT];
    float c[COUNT];
    explicit RowOf(const Terms& terms) {
        for (int t = 0; t < COUNT; ++t) {
            x[t] = terms.inputs[t];
            c[t] = terms.coefficients[t];
        }
    }
    template <class At>
    inline __attribute__((always_inline)) float operator()(At at) const {
        float y = at(x[0]);
        for (int t = 1; t < COUNT; ++t) y += c[t] * at(x[t]);
        return y;
    }
};

// Calls run(row) with the row that the terms make.
template <class T, class Run>
inline auto with_row(const Terms& terms, Run&& run) {
    switch (terms.count) {
        case 2: return run(RowOf<T, 2>(terms));
        case 3: return run(RowOf<T, 3>(terms));
        case 4: return run(RowOf<T, 4>(terms));
        default: return run(RowOf<T, 1>(terms));
    }
}

template <class T>
double sum_as(const Terms& terms, Size n) {
    return with_row<T>(terms, [&](const auto& row) {
        // as a product with a number that gcc does not know: it tears a loop of mere additions apart
        const float one = n < 0 ? 0.0f : 1.0f;
        return sum_each<T>(n, [&](auto at, float total) __attribute__((always_inline)) {
            return fused(one, row(at), total);
        }, ahead_of_all(row.x));
    });
}

double sum(const Terms& terms, Dtype dtype, Size n) {
    return dtype == Dtype::bfloat16 ? sum_as<Bfloat16>(terms, n) : sum_as<Float32>(terms, n);
}

template <class T>
double centred_square_as(const Terms& terms, float mean, Size n) {
    return with_row<T>(terms, [&](const auto& row) {
        return sum_each<T>(n, [&](auto at, float total) __attribute__((always_inline)) {
            const float d = row(at) - mean;
            return fused(d, d, total);
        }, ahead_of_all(row.x, n * Size(sizeof(typename T::Stored))));
    });
}

double centred_square(const Terms& terms, Dtype dtype, float mean, Size n) {
    return dtype == Dtype::bfloat16 ? centred_square_as<Bfloat16>(terms, mean, n)
                                    : centred_square_as<Float32>(terms, mean, n);
}

template <class T, int COUNT>
double load_and_sum_of(const void* const* inputs, const float* c, float* __restrict to, Size n) {
    const void* x[COUNT];
    float k[COUNT];
    for (int t = 0; t < COUNT; ++t) {
        x[t] = inputs[t];
        k[t] = t == 0 ? 1.0f : c[t];
    }
    return sum_each<T>(n, [&](auto at, float total) __attribute__((always_inline)) {
        float y = at(x[0]);
        for (int t = 1; t < COUNT; ++t) y += k[t] * at(x[t]);
        to[at.sorted(n)] = y;
        return total + y;
    }, ahead_of_all(x));
}

template <class T>
double load_and_sum_as(const void* const* x, const float* c, int count, float* to, Size n) {
    switch (count) {
        case 1: return load_and_sum_of<T, 1>(x, c, to, n);
        case 2: return load_and_sum_of<T, 2>(x, c, to, n);
        case 3: return load_and_sum_of<T, 3>(x, c, to, n);
        case 4: return load_and_sum_of<T, 4>(x, c, to, n);
        default: return 0;
    }
}

double load_and_sum(const void* const* x, const float* c, int count, Dtype dtype, float* to, Size n) {
    return dtype == Dtype::bfloat16 ? load_and_sum_as<Bfloat16>(x, c, count, to, n)
                                    : load_and_sum_as<Float32>(x, c, count, to, n);
}

template <class T>
void add_row_as(const void* x, float c, float* __restrict y, Size n) {
    in_lanes<T>(n, [&](auto at, int) __attribute__((always_inline)) { y[at.sorted(n)] += c * at(x); });
}

void add_row(const void* x, Dtype dtype, float c, float* y, Size n) {
    dtype == Dtype::bfloat16 ? add_row_as<Bfloat16>(x, c, y, n) : add_row_as<Float32>(x, c, y, n);
}

template <class T>
void finish_as(const float* y, float mean, float factor, const float* scale, const float* shift, void* z, Size n) {
    write_each<T>(z, n, [&](auto at) __attribute__((always_inline)) {
        const Size k = at.sorted(n);
        return (y[k] - mean) * factor * scale[k] + shift[k];
    });
}

void finish(const float* y, float mean, float factor, const float* scale, const float* shift, void* z, Dtype dtype,
            Size n) {
    dtype == Dtype::bfloat16 ? finish_as<Bfloat16>(y, mean, factor, scale, shift, z, n)
                             : finish_as<Float32>(y, mean, factor, scale, shift, z, n);
}

template <class T>
void finish_pair_as(const float* y, float mean, float factor, const float* scale, const float* shift,
                    const void* previous, void* z, Size n, double* sums) {
    PairTotals<true> totals;
    write_in_lanes<T>(z, n, [&](auto at, int j) __attribute__((always_inline)) {
        const Size k = at.sorted(n);
        const float kept = T::rounded((y[k] - mean) * factor * scale[k] + shift[k]);
        totals.add(kept, at(previous), j);
        return kept;
    }, ahead_of(previous));
    totals.add_to(sums);
}

void finish_pair(const float* y, float mean, float factor, const float* scale, const float* shift,
                 const void* previous, void* z, Dtype dtype, Size n, double* sums) {
    dtype == Dtype::bfloat16 ? finish_pair_as<Bfloat16>(y, mean, factor, scale, shift, previous, z, n, sums)
                             : finish_pair_as<Float32>(y, mean, factor, scale, shift, previous, z, n, sums);
}

template <class T>
void modulate_as(const Terms& terms, float mean, float factor, const void* scale, const void* shift,
                 const void* previous, void* z, Size n, double* sums) {
    with_row<T>(terms, [&](const auto& row) {
        const auto value = [&](auto at) __attribute__((always_inline)) {
            return (row(at) - mean) * factor * (1.0f + at(scale)) + at(shift);
        };
        if (previous == nullptr) return write_each<T>(z, n, value);
        PairTotals<true> totals;
        write_in_lanes<T>(z, n, [&](auto at, int j) __attribute__((always_inline)) {
            const float kept = T::rounded(value(at));
            totals.add(kept, at(previous), j);
            return kept;
        }, ahead_of(previous));
        totals.add_to(sums);
    });
}

void modulate(const Terms& terms, float mean, float factor, const void* scale, const void* shift, const void* previous,
              void* z, Dtype dtype, Size n, double* sums) {
    const auto run = dtype == Dtype::bfloat16 ? modulate_as<Bfloat16> : modulate_as<Float32>;
    run(terms, mean, factor, scale, shift, previous, z, n, sums);
}

template <class T>
void unsort_as(const float* y, void* to, Size n) {
    write_each<T>(to, n, [&](auto at) __attribute__((always_inline)) { return y[at.sorted(n)]; });
}

void unsort(const float* y, void* to, Dtype dtype, Size n) {
    dtype == Dtype::bfloat16 ? unsort_as<Bfloat16>(y, to, n) : unsort_as<Float32>(y, to, n);
}

template <class T>
void guide_as(const void* cond, const void* uncond, float scale, float* __restrict v, Size n, double* sums) {
    Totals<2> totals;
    in_lanes<T>(n, [&](auto at, int j) __attribute__((always_inline)) {
        const float x = at(cond), y = at(uncond), mixed = y + scale * (x - y);
        v[at.place()] = mixed;
        totals.lane[0][j] = fused(x, x, totals.lane[0][j]);
        totals.lane[1][j] = fused(mixed, mixed, totals.lane[1][j]);
    }, ahead_of(cond, uncond));
    totals.add_to(sums);
}

void guide(const void* c, const void* u, Dtype dtype, float scale, float* v, Size n, double* sums) {
    dtype == Dtype::bfloat16 ? guide_as<Bfloat16>(c, u, scale, v, n, sums) : guide_as<Float32>(c, u, scale, v, n, sums);
}

void rescale(float* v, float factor, Size n) {
    for (Size i = 0; i < n; ++i) v[i] *= factor;
}

template <class T, int COUNT>
void products_of(const void* a, const void* const* others, Size n, double* sums) {
    const void* b[COUNT];
    for (int t = 0; t < COUNT; ++t) b[t] = others[t];
    Totals<COUNT> totals;
    in_lanes<T>(n, [&](auto at, int j) __attribute__((always_inline)) {
        const float x = at(a);
        for (int t = 0; t < COUNT; ++t) totals.lane[t][j] = fused(x, at(b[t]), totals.lane[t][j]);
    }, ahead_of(a));  // the others have, or had, their turn
    totals.add_to(sums);
}

template <class T>
void products_as(const void* a, const void* const* b, int count, Size n, double* sums) {
    for (; count > 4; b += 4, sums += 4, count -= 4) products_of<T, 4>(a, b, n, sums);
    switch (count) {
        case 1: return products_of<T, 1>(a, b, n, sums);
        case 2: return products_of<T, 2>(a, b, n, sums);
        case 3: return products_of<T, 3>(a, b, n, sums);
        case 4: return products_of<T, 4>(a, b, n, sums);
        default: return;
    }
}

void products(const void* a, const void* const* b, int count, Dtype dtype, Size n, double* sums) {
    dtype == Dtype::bfloat16 ? products_as<Bfloat16>(a, b, count, n, sums) : products_as<Float32>(a, b, count, n, sums);
}

#ifdef VECTOR_BYTES
void stream(const void* from, void* to, Size bytes) {
    const auto* x = static_cast<const char*>(from);
    auto* y = static_cast<char*>(to);
    const Size head = std::min<Size>(-reinterpret_cast<std::uintptr_t>(y) % VECTOR_BYTES, bytes);
    std::memcpy(y, x, head);
    Size at = head;
    for (; at + VECTOR_BYTES <= bytes; at += VECTOR_BYTES) stream_vector(x + at, y + at);
    std::memcpy(y + at, x + at, bytes - at);
}
#else
void stream(const void* from, void* to, Size bytes) { std::memcpy(to, from, bytes); }
#endif

const Loops table{NAME,    load,       store,  map,     map_two,       subtract,     add_scaled,
                  product, has_bad,    pair_sums, capture, norms,      errors,       products,
                  differences, encode, decode, lerp,    lerp_backward, load_and_sum, add_row,
                  sum,     centred_square, finish, finish_pair, modulate, unsort, guide,
                  rescale, stream};
