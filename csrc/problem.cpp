#include "problem.hpp"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>

namespace layercache {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

template <typename Value>
void require(bool holds, const char* expectation, Value value) {
    if (holds) return;
    std::ostringstream message;
    message << expectation << ", got " << value;
    refuse(message.str());
}

void check_limits(const Problem& problem) {
    require(problem.budget >= 0.0, "budget must be at least 0", problem.budget);
    require(problem.history >= 1, "history must be at least 1", problem.history);
    require(problem.max_run >= 1, "max_run must be at least 1", problem.max_run);
    require(problem.tau >= 0.0 && problem.tau < 1.0, "tau must be in [0, 1)", problem.tau);
    for (int span : problem.spans) require(span >= 1, "spans must be at least 1", span);
}

void check_costs(const Problem& problem) {
    for (int group = 0; group < problem.groups; ++group) {
        const double compute = problem.compute_cost[group];
        const double cached = problem.cached_cost[group];
        require(std::isfinite(compute) && compute > 0.0, "compute_cost must be finite and above 0", compute);
        require(cached >= 0.0 && cached < compute, "cached_cost must be at least 0 and below compute_cost", cached);
    }
}

[[noreturn]] void refuse_error(int step, int group, int distance, int span, double value) {
    std::ostringstream message;
    message << "errors must be at least 0, got " << value << " at step " << step << ", group " << group
            << ", distance " << distance << ", span " << span;
    refuse(message.str());
}

void check_errors_of(const Problem& problem, int step, int group) {
    for (int distance = 1; distance <= std::min(step, problem.max_distance); ++distance) {
        const int anchor = step - distance;
        for (int span = 0; span <= std::min(anchor, problem.max_span); ++span) {
            const double value = problem.error(step, group, distance, span);
            if (!(value >= 0.0)) refuse_error(step, group, distance, span, value);
        }
    }
}

void check_errors(const Problem& problem) {
    for (int step = 0; step < problem.steps; ++step) {
        for (int group = 0; group < problem.groups; ++group) {
            problem.poll();
            check_errors_of(problem, step, group);
        }
    }
}

} // namespace

void normalise(Problem& problem) {
    check_limits(problem);
    check_costs(problem);
    check_errors(problem);
    std::sort(problem.spans.begin(), problem.spans.end());
    problem.spans.erase(std::unique(problem.spans.begin(), problem.spans.end()), problem.spans.end());
    std::fill_n(problem.protected_cells.begin(), problem.groups, char{1});
}

} // namespace layercache
