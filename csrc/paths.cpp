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

struct Label {
    double cost = infinity;
    Errors errors; // only where they are compared
    int previous = -1;
};

class PathSolver {
public:
    explicit PathSolver(const PathProblem& problem) : problem_(problem) {
        edges_.resize(static_cast<std::size_t>(problem.steps) * (problem.max_length + 1));
        for (int start = 0; start < problem.steps; ++start) {
            for (int length = 1; length <= reach(start); ++length) edge(start, length) = best_edge(start, length);
        }
    }

    Path solve() {
        const int budget = std::min(problem_.budget, problem_.steps);
        // labels[k][s]: the best path that stands at s after k computed steps
        std::vector<std::vector<Label>> labels(budget + 1, std::vector<Label>(problem_.steps + 1));
        labels[0][0].cost = 0.0;
        for (int count = 0; count < budget; ++count) {
            for (int start = count; start < problem_.steps; ++start) {
                if (std::isfinite(labels[count][start].cost)) extend(labels[count][start], start, labels[count + 1]);
            }
        }
        return read(labels, budget);
    }

private:
    Edge& edge(int start, int length) {
        return edges_[static_cast<std::size_t>(start) * (problem_.max_length + 1) + length];
    }

    // The longest edge from here that passes by no required step.
    int reach(int start) const {
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

    void extend(const Label& from, int start, std::vector<Label>& next) {
        for (int length = 1; length <= reach(start); ++length) {
            const double weight = edge(start, length).weight;
            if (!std::isfinite(weight)) continue;
            Label label{from.cost + weight, problem_.lexicographic ? with(from.errors, weight) : Errors{}, start};
            Label& best = next[start + length];
            if (precedes(label, best)) best = std::move(label);
        }
    }

    Path read(const std::vector<std::vector<Label>>& labels, int budget) {
        Path path;
        path.curve.assign(problem_.budget + 1, infinity);
        int best = 0;
        for (int count = 1; count <= budget; ++count) {
            const Label& label = labels[count][problem_.steps];
            path.curve[count] = label.cost;
            if (std::isfinite(label.cost) && (best == 0 || precedes(label, labels[best][problem_.steps]))) best = count;
        }
        if (best == 0) return path;
        path.feasible = true;
        path.cost = path.curve[best];
        for (int step = problem_.steps, count = best; count > 0; --count) {
            const int start = labels[count][step].previous;
            path.steps.push_back(start);
            path.choice.push_back(edge(start, step - start).choice);
            step = start;
        }
        std::reverse(path.steps.begin(), path.steps.end());
        std::reverse(path.choice.begin(), path.choice.end());
        return path;
    }

    const PathProblem& problem_;
    std::vector<Edge> edges_;
};

} // namespace

Path shortest_path(const PathProblem& problem) {
    check(problem);
    return PathSolver(problem).solve();
}

} // namespace layercache
