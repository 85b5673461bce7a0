#include "chains.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace layercache {
namespace {

int power(int base, int exponent) { return exponent == 0 ? 1 : base * power(base, exponent - 1); }

} // namespace

double Chains::size(const Problem& problem, int history) {
    const double gaps = problem.run_limit() + 1.0;
    const int kept = std::min({history, problem.history, most_history});
    return problem.steps * std::pow(gaps + 1.0, kept - 1) + 1.0;
}

Chains::Chains(const Problem& problem, const RunCosts& costs, int group, int history)
    : steps_(problem.steps), history_(std::min({history, problem.history, most_history})),
      longest_gap_(problem.run_limit() + 1), width_(power(longest_gap_ + 1, history_ - 1)),
      reached_(states(), 0), costs_(new double[static_cast<std::size_t>(states()) * longest_gap_]) {
    reached_[start()] = 1;
    for (int state = 0; state < end(); ++state) {
        if (!reached(state)) continue;
        if (state % 16 == 0) problem.poll();
        cost_moves(problem, costs, group, state);
        for (int gap = 1; gap <= longest_gap_; ++gap) {
            if (std::isfinite(cost(state, gap))) reached_[next(state, gap)] = 1;
        }
    }
}

// The digits of a state's remainder are gaps, the newest in front; 0 where there is no older step.
int Chains::next(int state, int gap) const {
    const int to = step(state) + gap;
    if (to >= steps_) return end();
    const int gaps = state % width_;
    const int kept = history_ == 3 ? gaps / (longest_gap_ + 1) : 0;
    const int code = history_ == 1 ? 0 : history_ == 2 ? gap : gap * (longest_gap_ + 1) + kept;
    return to * width_ + code;
}

void Chains::write_steps(int state, Steps& steps) const {
    steps.clear();
    int at = step(state);
    steps.push_back(at);
    int gaps = state % width_;
    for (int digit = history_ - 2; digit >= 0; --digit) {
        const int place = power(longest_gap_ + 1, digit);
        const int gap = gaps / place;
        gaps %= place;
        if (gap == 0) break;
        at -= gap;
        steps.push_back(at);
    }
    std::reverse(steps.begin(), steps.end());
}

void Chains::cost_moves(const Problem& problem, const RunCosts& costs, int group, int state) {
    Steps steps;
    write_steps(state, steps);
    const std::size_t at = steps.size() - 1;
    const int from = steps[at];
    double* row = &costs_[static_cast<std::size_t>(state) * longest_gap_];
    std::fill_n(row, longest_gap_, std::numeric_limits<double>::infinity());
    steps.push_back(0);
    for (int gap = 1; gap <= std::min(longest_gap_, problem.steps - from); ++gap) {
        if (gap > 1 && problem.is_protected(from + gap - 1, group)) return;
        steps[at + 1] = from + gap;
        const double value = costs.best(group, steps, at).cost;
        if (!std::isfinite(value)) return; // a longer run contains this one
        row[gap - 1] = value;
    }
}

} // namespace layercache
