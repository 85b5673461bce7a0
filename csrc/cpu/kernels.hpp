// The native ops. Tensors were validated by the caller; `samples` counts entries of the first dim that are reduced
// apart (1: all together). Sums come back stream by stream, then sample by sample.
#pragma once

#include <optional>

#include "view.hpp"

namespace layercache::cpu {

using Sums = std::vector<double>;

// residual = output - before, rounded once; statistics: 0, 4 (residual, input) or 7 (residual, previous) numbers.
// Returns whether a residual holds NaN or infinity, if `look` says so.
bool capture(Views outputs, Views inputs, Views residuals, Views previous, int statistics, std::int64_t samples,
             bool look, int threads, Sums& sums);

Sums pair_statistics(const Views& a, const Views& b, std::int64_t samples, int threads);

// Coefficients [outputs][inputs]; `used` says which there are. With base (one output) input 0 is added as it is and
// the others are multiplied by the gate, if any. Scales, if any: one per input, null where it holds no e4m3 codes.
struct Map {
    std::vector<float> coefficients;
    std::vector<char> used;
    std::vector<float> factors;
    bool base = false;
};
void linear_map(const Views& inputs, const Views& outputs, const Map& map, const std::optional<View>& gate,
                const std::vector<const float*>& scales, int threads);

Sums combination_error(const View& target, const Views& terms, const std::vector<float>& coefficients, int threads);
Sums gram(const Views& tensors, int threads);
Sums linear_sums(const Views& tensors, const Map& map, int outputs, int threads);

// Codes and one power of two per row; returns whether a difference is NaN or infinite, if `look` says so.
bool capture_compact(const View& output, const View& before, const View& codes, float* scales, bool look, int threads);

// Beta: one number, or one per entry of the batch.
void router_lerp(const View& fresh, const View& cached, const std::vector<float>& beta, const std::optional<View>& gate,
                 const std::optional<View>& residual, const View& out, int threads);
Sums router_lerp_backward(const View& grad, const View& fresh, const View& cached, const std::vector<float>& beta,
                          const std::optional<View>& gate, const View& grad_fresh, int threads);

struct Modulation {
    View x, scale, shift, z;
    Views residuals;
    std::vector<float> coefficients;
    std::optional<View> previous, weight, bias, stream;
    std::vector<std::int64_t> bounds;
    float eps;
    std::vector<const float*> code_scales;  // of residuals that are e4m3 codes
};
// Statistics of z and previous, range by range.
Sums modulate(const Modulation& m, int threads);
void guidance(const View& cond, const View& uncond, float scale, bool rescale, const View& out, int threads);
// Sums over the rows of each sample of q - 1, (q - 1)^2 and 1 - cos.
Sums row_statistics(const View& a, const View& b, std::int64_t samples, int threads);
// Adds the polynomial (highest power first) of the ratio; whether the total stays below the threshold, else it is 0.
bool decide(float numerator, float denominator, float& accumulated, const std::vector<float>& polynomial,
            float threshold);

}  // namespace layercache::cpu
