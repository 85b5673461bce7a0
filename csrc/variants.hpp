// Rules by which other methods choose whole steps: SmoothCache's threshold and DPCache's path.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

namespace layercache {

// SmoothCache: from each computed step, skip as many following steps as an error below the threshold allows.
// errors [distances + 1, steps]: entry [j, i] compares steps i and i + j. The first and the last step are
// computed. Returns the computed steps.
std::vector<int> threshold_steps(const std::vector<double>& errors, int distances, int steps, double threshold);

// DPCache: the cost of the steps between two computed steps j < k depends on the computed step i before j.
struct PairPathProblem {
    int steps = 0;
    std::vector<double> costs; // [steps + 1]^3, entry [i, j, k]; i = steps: there is none; k = steps: the end
    int budget = 0;            // most computed steps
    int first = 1;             // so many first steps are always computed
    bool exact = false;        // false: the published recursion, which keeps one i for every (count, j)
    std::function<void()> interrupt;

    double cost(int before, int from, int to) const {
        const std::size_t side = static_cast<std::size_t>(steps) + 1;
        return costs[(before * side + from) * side + to];
    }
};

struct PairPath {
    bool feasible = false;
    std::vector<int> steps;
    double cost = 0.0;
};

// Throws std::invalid_argument naming the argument at fault.
PairPath pair_path(const PairPathProblem& problem);

} // namespace layercache
