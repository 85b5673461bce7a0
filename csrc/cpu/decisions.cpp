#include "kernels.hpp"

namespace layercache::cpu {

bool decide(float numerator, float denominator, float& accumulated, const std::vector<float>& polynomial,
            float threshold) {
    const float ratio = numerator / denominator;
    float change = polynomial[0] + 0.0f * ratio;
    for (std::size_t k = 1; k < polynomial.size(); ++k) change = change * ratio + polynomial[k];
    const float total = accumulated + change;
    const bool small = total < threshold;  // false for NaN
    accumulated = small ? total : 0.0f;
    return small;
}

}  // namespace layercache::cpu
