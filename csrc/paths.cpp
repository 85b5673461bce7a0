#include "paths.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace layercache {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

void check(const PathProblem& problem) {
    if (problem.budget < 1) refuse("budget must be at least 1, got " + std::to_string(problem.budget));
    if (!(problem.gamma > 0.0) || !std::isfinite(problem.gamma)) {
        refuse("gamma must be finite and above 0, got " + std::to_string(problem.gamma));
    }
    for (int start = 0; start < problem.steps; ++start) {
        problem.interrupt.poll();
        for (int length = 2; length <= problem.max_length; ++length) {
            for (int choice = 0; choice < problem.choices; ++choice) {
                const double value = problem.error(start, length, choice);
                if (value >= 0.0) continue;
                std::ostringstream message;
                message << "errors must be at least 0, got " << value << " at step " << start << ", length " << length
                        << ", choice " << choice;
                refuse(message.str());
            }
        }
    }
}

// The best of the parallel edges.
struct Edge {
    double weight = infinity;
    int choice = 0;
};

// The errors of a path, dearest first. Zeros are left out, so that a shorter list is the cheaper one.
using Errors = std::vector<double>;

Errors with(const Errors& errors, double weight) {
    Errors more = errors;
    if (weight > 0.0) more.insert(std::upper_bound(more.begin(), more.end(), weight, std::greater<>()), weight);
    return more;
}

// The best path to a step.
struct Label {
    double cost = infinity;
    Errors errors; // only where they are compared
};

class PathSolver {
public:
    explicit PathSolver(const PathProblem& problem)
        : problem_(problem), width_(std::min(problem.max_length, problem.steps) + 1),
          budget_(std::min(problem.budget, problem.steps)), reach_(problem.steps),
          edges_(static_cast<std::size_t>(problem.steps) * width_),
          previous_((static_cast<std::size_t>(budget_) + 1) * (problem.steps + 1), -1) {
        for (int start = 0; start < problem.steps; ++start) {
            problem.interrupt.poll();
            reach_[start] = longest_from(start);
            for (int length = 1; length <= reach_[start]; ++length) edge(start, length) = best_edge(start, length);
        }
    }

    Path solve() {
        // by step: the best paths with `count` computed steps that stand there, and those with one more
        std::vector<Label> here(problem_.steps + 1), next;
        std::vector<Label> ends(budget_ + 1);
        here[0].cost = 0.0;
        for (int count = 0; count < budget_; ++count) {
            next.assign(problem_.steps + 1, {});
            for (int start = count; start < problem_.steps; ++start) {
                if (std::isfinite(here[start].cost)) extend(here[start], start, count + 1, next);
            }
            ends[count + 1] = next[problem_.steps];
            std::swap(here, next);
        }
        return read(ends);
    }

private:
    Edge& edge(int start, int length) { return edges_[static_cast<std::size_t>(start) * width_ + length]; }

    // The step before this one on the best path with so many computed steps.
    int& previous(int count, int step) {
        return previous_[static_cast<std::size_t>(count) * (problem_.steps + 1) + step];
    }

    // The longest edge from here that passes by no required step.
    int longest_from(int start) const {
        const int longest = std::min(problem_.max_length, problem_.steps - start);
        for (int length = 1; length < longest; ++length) {
            if (problem_.required[start + length]) return length;
        }
        return longest;
    }

    Edge best_edge(int start, int length) const {
        if (length == 1) return {0.0, 0};
        Edge best;
        for (int choice = 0; choice < problem_.choices; ++choice) {
            const double weight = std::pow(problem_.error(start, length, choice), problem_.gamma);
            if (weight < best.weight) best = {weight, choice};
        }
        return best;
    }

    bool precedes(const Label& a, const Label& b) const {
        if (!problem_.lexicographic || !std::isfinite(b.cost)) return a.cost < b.cost;
        return std::lexicographical_compare(a.errors.begin(), a.errors.end(), b.errors.begin(), b.errors.end());
    }

    void extend(const Label& from, int start, int count, std::vector<Label>& next) {
        problem_.interrupt.poll();
        for (int length = 1; length <= reach_[start]; ++length) {
            const double weight = edge(start, length).weight;
            if (!std::isfinite(weight)) continue;
            Label& best = next[start + length];
            const double cost = from.cost + weight;
            if (!problem_.lexicographic) {
                if (cost >= best.cost) continue;
                best.cost = cost;
            } else {
                Label label{cost, with(from.errors, weight)};
                if (!precedes(label, best)) continue;
                best = std::move(label);
            }
            previous(count, start + length) = start;
        }
    }

    Path read(const std::vector<Label>& ends) {
        Path path;
        int best = 0;
        for (int count = 0; count <= budget_; ++count) {
            path.curve.push_back(ends[count].cost);
            if (std::isfinite(ends[count].cost) && (best == 0 || precedes(ends[count], ends[best]))) best = count;
        }
        if (best == 0) return path;
        path.feasible = true;
        path.cost = path.curve[best];
        for (int step = problem_.steps, count = best; count > 0; --count) {
            const int start = previous(count, step);
            path.steps.push_back(start);
            path.choice.push_back(edge(start, step - start).choice);
            step = start;
        }
        std::reverse(path.steps.begin(), path.steps.end());
        std::reverse(path.choice.begin(), path.choice.end());
        return path;
    }

    const PathProblem& problem_;
    int width_, budget_;
    std::vector<int> reach_; // [steps]
    std::vector<Edge> edges_;
    std::vector<int> previous_; // [budget + 1, steps + 1]
};

} // namespace

Path shortest_path(const PathProblem& problem) {
    check(problem);
    return PathSolver(problem).solve();
}

} // namespace layercache
