// The inner loops, compiled once per instruction set and chosen at run time.
#pragma once

#include <cstddef>

#include "view.hpp"

namespace layercache::cpu {

// Elements that are worked on at a time: a dozen buffers of them stay in the first-level cache.
constexpr std::int64_t CHUNK = 2048;
constexpr int PAIR_STATISTICS = 8;

using Size = std::int64_t;

struct Loops {
    const char* name;
    // Numbers of any dtype to and from fp32; rounded to nearest, ties to even.
    void (*load)(const void* from, Dtype dtype, float* to, Size n);
    void (*store)(const float* from, void* to, Dtype dtype, Size n);
    // y = x_0 + g sum over k >= 1 of c_k x_k, or, without base, factor * sum over all k; the gate may be null. Up to nine
    // inputs, and the output, all fp32 or all bf16; every product is rounded before it is added. The output may be one of
    // the inputs.
    void (*map)(const void* const* x, const float* c, int count, bool base, float factor, const float* gate, void* y,
                Dtype dtype, Size n);
    // y += c x; y = x - z.
    void (*add_scaled)(const float* x, float c, float* y, Size n);
    void (*subtract)(const float* x, const float* z, float* y, Size n);
    // Whether NaN or infinity is among the numbers.
    bool (*has_bad)(const float* x, Size n);
    // Adds {|a-b|, |a|, |b|, (a-b)^2, a^2, b^2, a b} to sums[0..6], and raises sums[7] to max|a-b|; fp32 or bf16.
    void (*pair_sums)(const void* a, const void* b, Dtype dtype, Size n, double* sums);
    // residual = output - input, and the sums of the pair (residual, previous), or (residual, input) where previous is
    // null, without the maximum; all fp32 or all bf16. Whether NaN or infinity is among the residuals, if `look`.
    bool (*capture)(const void* output, const void* input, const void* previous, void* residual, Dtype dtype, bool look,
                    Size n, double* sums);
    // Adds {|y|, y^2} of y = sum_k c_k x_k, up to eight terms, to sums[0..1]; fp32 or bf16.
    void (*norms)(const void* const* x, const float* c, int count, Dtype dtype, Size n, double* sums);
    double (*dot)(const float* a, const float* b, Size n);
    float (*peak)(const float* x, Size n);
    // fp8 e4m3 codes: of numbers times a power of two; and back.
    void (*encode)(const float* x, float inverse, std::uint8_t* codes, Size n);
    void (*decode)(const std::uint8_t* codes, float scale, float* x, Size n);
    // beta f + (1 - beta) c, from the nearer end; fp32 or bf16. Backward: out = beta grad, returns sum grad (f - c).
    void (*lerp)(const void* f, const void* c, float beta, void* o, Dtype dtype, Size n);
    double (*lerp_backward)(const float* grad, const float* f, const float* c, float beta, float* out, Size n);
    // y = x y; sum x; sum (x - mean)^2.
    void (*product)(const float* x, float* y, Size n);
    double (*sum)(const float* x, Size n);
    double (*centred_square)(const float* x, float mean, Size n);
    // z = ((x - mean) factor weight + bias) (1 + scale) + shift; weight and bias may be null.
    void (*finish)(const float* x, float mean, float factor, const float* weight, const float* bias,
                   const float* scale, const float* shift, float* z, Size n);
    // v *= factor; v = u + scale (c - u).
    void (*rescale)(float* v, float factor, Size n);
    void (*guide)(const float* c, const float* u, float scale, float* v, Size n);
};

// The best the processor has, or the one of that name ("base", "avx2", "avx512"); nullptr if it has not.
const Loops* loops(const char* name = nullptr);
const Loops& active();
bool activate(const char* name);

}  // namespace layercache::cpu
