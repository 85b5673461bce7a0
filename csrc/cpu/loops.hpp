// The inner loops, compiled once per instruction set and chosen at run time.
#pragma once

#include <cstddef>

#include "view.hpp"

// Whether the loops are compiled for AVX2 and AVX512 as well.
#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_X86_LOOPS
#endif

// What follows is compiled for this processor alone, down to `TARGET_END`. Behind all includes: their inline functions
// are shared with the other files.
#define PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define TARGET_BEGIN(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TARGET_END PRAGMA(clang attribute pop)
#else
#define TARGET_BEGIN(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define TARGET_END PRAGMA(GCC pop_options)
#endif

// In front of a loop whose turns do not depend on each other and whose body is for vectors: gcc unrolls a short one before
// it thinks of vectors. And in front of one with a few turns, which compilers should write out.
#ifdef __clang__
#define VECTOR_LOOP PRAGMA(clang loop vectorize(assume_safety) unroll(disable))
#define UNROLLED PRAGMA(clang loop unroll(full))
#else
#define VECTOR_LOOP PRAGMA(GCC ivdep) PRAGMA(GCC unroll 1)
#define UNROLLED PRAGMA(GCC unroll 3)
#endif

namespace layercache::cpu {

// Elements that are worked on at a time: a dozen buffers of them stay in the first-level cache.
constexpr std::int64_t CHUNK = 1024;
constexpr int PAIR_STATISTICS = 8;

using Size = std::int64_t;

// Of one output: the coefficients of its inputs, the factor of their sum, and where it goes.
struct Weights {
    const float* coefficients;
    float factor;
    void* output;
};
// One of several predictions that begin with the same term: the other term, their coefficients, and where the two sums
// of the error go.
struct Pairing {
    const void* other;
    float of_common, of_other;
    double* sums;
};
constexpr int MOST_PAIRINGS = 24;  // that are looked at together
constexpr int MOST_LOADED = 4;  // inputs whose sum is loaded in one go

// The row x_0 + sum over k >= 1 of c_k x_k, up to `MOST_LOADED` inputs.
struct Terms {
    const void* inputs[MOST_LOADED];
    float coefficients[MOST_LOADED];
    int count = 1;
};
constexpr int MOST_SHARED = 4;  // inputs of two outputs that are computed at once

struct Loops {
    const char* name;
    // Numbers of any dtype to and from fp32; rounded to nearest, ties to even.
    void (*load)(const void* from, Dtype dtype, float* to, Size n);
    void (*store)(const float* from, void* to, Dtype dtype, Size n);
    // y = x_0 + g sum over k >= 1 of c_k x_k, or, without base, factor * sum over all k; the gate may be null. Up to nine
    // inputs, the gate and the output, all fp32 or all bf16; every product is rounded before it is added. The output may
    // be one of the inputs.
    void (*map)(const void* const* x, const float* c, int count, bool base, float factor, const void* gate, void* y,
                Dtype dtype, Size n);
    // Two of them at once, without base and gate: y = factor * sum over the first `fewer` or all of 2 to 4 inputs; `fewer`
    // is their number or one less. Outputs may be inputs.
    void (*map_two)(const void* const* x, int count, int fewer, const Weights& few, const Weights& all, Dtype dtype,
                    Size n);
    // y = x - z; y += c x; y = x y.
    void (*subtract)(const float* x, const float* z, float* y, Size n);
    void (*add_scaled)(const float* x, float c, float* y, Size n);
    void (*product)(const float* x, float* y, Size n);
    // Whether NaN or infinity is among the numbers.
    bool (*has_bad)(const float* x, Size n);

    // What follows takes tensors that are all fp32 or all bf16.

    // Adds {|a-b|, |a|, |b|, (a-b)^2, a^2, b^2, a b} to sums[0..6], and raises sums[7] to max|a-b|.
    void (*pair_sums)(const void* a, const void* b, Dtype dtype, Size n, double* sums);
    // residual = output - input, and the sums of the pair (residual, previous), or (residual, input) where previous is
    // null, without the maximum. Whether NaN or infinity is among the residuals, if `look`.
    bool (*capture)(const void* output, const void* input, const void* previous, void* residual, Dtype dtype, bool look,
                    Size n, double* sums);
    // Adds {|y|, y^2} of y = sum_k c_k x_k, up to eight terms, to sums[0..1].
    void (*norms)(const void* const* x, const float* c, int count, Dtype dtype, Size n, double* sums);
    // The same of y = a common + b other - target, of up to `MOST_PAIRINGS` at once.
    void (*errors)(const void* target, const void* common, const Pairing* pairings, int count, Dtype dtype, Size n);
    // Adds a b_k to sums[k].
    void (*products)(const void* a, const void* const* b, int count, Dtype dtype, Size n, double* sums);
    // r = output - input in fp32, and the largest size among them but for NaN. Whether NaN or infinity is among them.
    bool (*differences)(const void* output, const void* input, Dtype dtype, float* r, Size n, float& peak);
    // fp8 e4m3 codes: of numbers times a power of two; and back.
    void (*encode)(const float* x, float inverse, std::uint8_t* codes, Size n);
    void (*decode)(const std::uint8_t* codes, float scale, float* x, Size n);
    // o = r + g (beta f + (1 - beta) c), from the nearer end; gate and residual may be null.
    void (*lerp)(const void* f, const void* c, float beta, const void* g, const void* r, void* o, Dtype dtype, Size n);
    // o = beta g d; returns the sum of g d (f - c); the gate may be null.
    double (*lerp_backward)(const void* d, const void* f, const void* c, float beta, const void* g, void* o,
                            Dtype dtype, Size n);
    // Rows as fp32, sorted: of bf16 first the even numbers, then the odd ones, as they come out of packed pairs; of fp32
    // as they are. y = x_0 + sum over k >= 1 of c_k x_k, up to `MOST_LOADED` inputs, and its sum; y += c x; the sum of a
    // row, sorted or of terms; sum (y - mean)^2 likewise; z = (y - mean) factor scale + shift, and the same with the sums of
    // the pair (z, previous), of which the previous one may be where z goes.
    double (*load_and_sum)(const void* const* x, const float* c, int count, Dtype dtype, float* to, Size n);
    void (*add_row)(const void* x, Dtype dtype, float c, float* y, Size n);
    double (*sum)(const Terms& y, Dtype dtype, Size n);
    double (*centred_square)(const Terms& y, Dtype dtype, float mean, Size n);
    void (*finish)(const float* y, float mean, float factor, const float* scale, const float* shift, void* z,
                   Dtype dtype, Size n);
    void (*finish_pair)(const float* y, float mean, float factor, const float* scale, const float* shift,
                        const void* previous, void* z, Dtype dtype, Size n, double* sums);
    // z = (y - mean) factor (1 + scale) + shift of rows of terms, with the sums of the pair if there is a previous one.
    void (*modulate)(const Terms& y, float mean, float factor, const void* scale, const void* shift,
                     const void* previous, void* z, Dtype dtype, Size n, double* sums);
    void (*unsort)(const float* y, void* to, Dtype dtype, Size n);
    // v = u + scale (c - u), and adds c^2 and v^2 to sums[0..1]; v *= factor.
    void (*guide)(const void* c, const void* u, Dtype dtype, float scale, float* v, Size n, double* sums);
    void (*rescale)(float* v, float factor, Size n);
    // Copies bytes past the caches; other threads see them behind a fence, which `for_parts` has.
    void (*stream)(const void* from, void* to, Size bytes);
};

// The best the processor has, or the one of that name ("base", "avx2", "avx512"); nullptr if it has not.
const Loops* loops(const char* name = nullptr);
const Loops& active();
bool activate(const char* name);

}  // namespace layercache::cpu
