#include "starts.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

namespace layercache {
namespace {

// The best known list of computed steps that ends with the step the label belongs to.
struct Label {
    int count = 0; // 0: not reached
    double cost = 0.0;
    int previous = -1;

    bool beats(const Label& other) const {
        return other.count == 0 || std::tie(count, cost) < std::tie(other.count, other.cost);
    }
};

Steps trail(const std::vector<Label>& labels, int end, std::size_t longest) {
    Steps steps;
    for (int step = end; step >= 0 && steps.size() < longest; step = labels[step].previous) steps.push_back(step);
    std::reverse(steps.begin(), steps.end());
    return steps;
}

// Extends the list that ends with `anchor` by every next computed step it can reach.
void extend(const Problem& problem, const RunCosts& costs, int group, int anchor, std::vector<Label>& labels) {
    Steps steps = trail(labels, anchor, problem.history);
    const std::size_t at = steps.size() - 1;
    for (int next = anchor + 1; next <= problem.steps; ++next) {
        if (next % 64 == 0) problem.poll();
        steps.resize(at + 1);
        steps.push_back(next);
        const double cost = costs.best(group, steps, at).cost;
        if (!std::isfinite(cost)) return; // a longer run contains this one
        const Label label{labels[anchor].count + 1, labels[anchor].cost + cost, anchor};
        if (label.beats(labels[next])) labels[next] = label;
        if (next < problem.steps && problem.is_protected(next, group)) return;
    }
}

Steps sparsest(const Problem& problem, const RunCosts& costs, int group) {
    std::vector<Label> labels(problem.steps + 1);
    labels[0].count = 1;
    for (int anchor = 0; anchor < problem.steps; ++anchor) {
        problem.poll();
        extend(problem, costs, group, anchor, labels);
    }
    return trail(labels, problem.steps, labels.size());
}

} // namespace

std::vector<Steps> all_steps(const Problem& problem) {
    Steps steps(static_cast<std::size_t>(problem.steps) + 1);
    std::iota(steps.begin(), steps.end(), 0);
    return std::vector<Steps>(problem.groups, steps);
}

std::vector<Steps> sparsest_steps(const Problem& problem, const RunCosts& costs) {
    std::vector<Steps> computed;
    for (int group = 0; group < problem.groups; ++group) computed.push_back(sparsest(problem, costs, group));
    return computed;
}

} // namespace layercache
