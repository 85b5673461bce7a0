#include "variants.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

namespace layercache {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

void check(const PairPathProblem& problem) {
    if (problem.first < 1 || problem.first > problem.steps) {
        refuse("first must be from 1 to the number of steps, got " + std::to_string(problem.first));
    }
    if (problem.budget < problem.first) {
        refuse("budget must be at least first (" + std::to_string(problem.first) + "), got " +
               std::to_string(problem.budget));
    }
    for (int before = 0; before <= problem.steps; ++before) {
        for (int from = 0; from < problem.steps; ++from) {
            if (before >= from && before != problem.steps) continue;
            for (int to = from + 1; to <= problem.steps; ++to) {
                if (problem.cost(before, from, to) >= 0.0) continue;
                std::ostringstream message;
                message << "costs must be at least 0, got " << problem.cost(before, from, to) << " at (" << before
                        << ", " << from << ", " << to << ")";
                refuse(message.str());
            }
        }
    }
}

// Labels [count, before, at]. The published recursion is the same with one label for each (count, at): of all
// `before`, only the best is kept.
class PairSolver {
public:
    explicit PairSolver(const PairPathProblem& problem)
        : problem_(problem), side_(static_cast<std::size_t>(problem.steps) + 1),
          budget_(std::min(problem.budget, problem.steps)), best_((budget_ + 1) * side_ * side_, infinity),
          older_(best_.size(), -1) {}

    PairPath solve() {
        const int start = problem_.first - 1;
        best_[index(problem_.first, start > 0 ? start - 1 : problem_.steps, start)] = 0.0;
        for (int count = problem_.first; count <= budget_; ++count) {
            if (problem_.interrupt) problem_.interrupt();
            for (int at = start; at < problem_.steps; ++at) extend(count, at);
        }
        return read();
    }

private:
    std::size_t index(int count, int before, int at) const { return (count * side_ + before) * side_ + at; }

    int best_before(int count, int at) const {
        int best = 0;
        for (int before = 1; before <= problem_.steps; ++before) {
            if (best_[index(count, before, at)] < best_[index(count, best, at)]) best = before;
        }
        return best;
    }

    void extend(int count, int at) {
        if (!problem_.exact) {
            extend_from(count, best_before(count, at), at);
            return;
        }
        for (int before = 0; before <= problem_.steps; ++before) extend_from(count, before, at);
    }

    void extend_from(int count, int before, int at) {
        const double here = best_[index(count, before, at)];
        if (!std::isfinite(here)) return;
        const double whole = here + problem_.cost(before, at, problem_.steps);
        if (whole < last_.cost) last_ = {whole, count, before, at};
        if (count == budget_) return;
        for (int to = at + 1; to < problem_.steps; ++to) {
            relax(index(count + 1, at, to), here + problem_.cost(before, at, to), before);
        }
    }

    void relax(std::size_t label, double value, int before) {
        if (value >= best_[label]) return;
        best_[label] = value;
        older_[label] = before;
    }

    PairPath read() const {
        PairPath path{std::isfinite(last_.cost), {}, last_.cost};
        if (!path.feasible) return path;
        int before = last_.before, at = last_.at;
        for (int count = last_.count; count > problem_.first; --count) {
            path.steps.push_back(at);
            const int older = older_[index(count, before, at)];
            at = before;
            before = older;
        }
        for (int step = problem_.first - 1; step >= 0; --step) path.steps.push_back(step);
        std::reverse(path.steps.begin(), path.steps.end());
        return path;
    }

    // The best whole path so far, by its last computed step.
    struct Last {
        double cost = infinity;
        int count = 0, before = 0, at = 0;
    };

    const PairPathProblem& problem_;
    std::size_t side_;
    int budget_;
    std::vector<double> best_;
    std::vector<int> older_;
    Last last_;
};

} // namespace

std::vector<int> threshold_steps(const std::vector<double>& errors, int distances, int steps, double threshold) {
    if (!(threshold >= 0.0)) refuse("threshold must be at least 0, got " + std::to_string(threshold));
    const auto skipped = [&](int step) {
        for (int distance = distances; distance >= 1; --distance) {
            if (step + distance >= steps) continue;
            const double error = errors[static_cast<std::size_t>(distance) * steps + step];
            if (std::isnan(error) || error < 0.0) {
                refuse("errors must be at least 0, got " + std::to_string(error) + " at distance " +
                       std::to_string(distance) + ", step " + std::to_string(step));
            }
            if (error <= threshold) return distance;
        }
        return 0;
    };
    std::vector<int> computed;
    for (int step = 0; step < steps; step += 1 + skipped(step)) computed.push_back(step);
    if (steps > 0 && computed.back() != steps - 1) computed.push_back(steps - 1);
    return computed;
}

PairPath pair_path(const PairPathProblem& problem) {
    check(problem);
    return PairSolver(problem).solve();
}

} // namespace layercache
