#include "selection.hpp"

#include <algorithm>
#include <cstddef>

namespace layercache {
namespace {

std::ptrdiff_t at_most(int history, std::ptrdiff_t available) {
    return std::min(static_cast<std::ptrdiff_t>(history), available);
}

} // namespace

Selection::Selection(const Problem& problem, const RunCosts& costs, std::vector<Steps> computed)
    : problem_(problem), costs_(costs), steps_(std::move(computed)), computed_(problem.cell(problem.steps, 0), 0),
      run_costs_(computed_.size(), 0.0) {
    for (int group = 0; group < problem.groups; ++group) {
        for (int step : steps_[group]) {
            if (step < problem.steps) computed_[problem.cell(step, group)] = 1;
        }
        price(group, 0, steps_[group].size());
    }
}

void Selection::flip(int step, int group) {
    char& state = computed_[problem_.cell(step, group)];
    Steps& steps = steps_[group];
    const auto place = std::lower_bound(steps.begin(), steps.end(), step);
    const auto at = static_cast<std::size_t>(place - steps.begin());
    if (state) {
        steps.erase(place);
    } else {
        steps.insert(place, step);
    }
    state = !state;
    price(group, at - 1, at + problem_.history);
}

void Selection::price(int group, std::size_t first, std::size_t last) {
    const Steps& steps = steps_[group];
    for (std::size_t at = first; at < last && at + 1 < steps.size(); ++at) {
        if (at % 64 == 0) problem_.poll();
        run_costs_[problem_.cell(steps[at], group)] = costs_.best(group, steps, at).cost;
    }
}

double Selection::priced(int group, const Steps& steps, std::size_t first) const {
    double sum = 0.0;
    for (std::size_t at = first; at + 1 < steps.size(); ++at) sum += run_costs_[problem_.cell(steps[at], group)];
    return sum;
}

double Selection::cost(int group, const Steps& steps, std::size_t first) const {
    double sum = 0.0;
    for (std::size_t at = first; at + 1 < steps.size(); ++at) sum += costs_.best(group, steps, at).cost;
    return sum;
}

// A residual is read by the runs of the next `history` computed steps at most, so a window of that many
// computed steps on either side holds everything that can change.
double Selection::gain(int step, int group) const {
    const Steps& steps = steps_[group];
    const auto [before_end, after] = std::equal_range(steps.begin(), steps.end(), step);
    const auto before = before_end - at_most(problem_.history, before_end - steps.begin());
    const auto after_end = after + at_most(problem_.history, steps.end() - after);

    window_.assign(before, before_end);
    const std::size_t first = window_.size() - 1;
    window_.insert(window_.end(), after, after_end);
    const bool now = computed(step, group);
    const double without = now ? cost(group, window_, first) : priced(group, window_, first);
    window_.insert(window_.begin() + static_cast<std::ptrdiff_t>(first) + 1, step);
    return without - (now ? priced(group, window_, first) : cost(group, window_, first));
}

std::pair<int, int> Selection::neighbourhood(int step, int group) const {
    const Steps& steps = steps_[group];
    const auto [before_end, after] = std::equal_range(steps.begin(), steps.end(), step);
    const auto first = before_end - at_most(problem_.history, before_end - steps.begin());
    const auto last = after + (at_most(problem_.history, steps.end() - after) - 1);
    return {*first, std::min(*last, problem_.steps - 1)};
}

// Counted afresh instead of updated: the sum then does not depend on the order of the moves.
double Selection::spent() const {
    double seconds = 0.0;
    for (int group = 0; group < problem_.groups; ++group) {
        const auto computed = static_cast<double>(steps_[group].size() - 1);
        seconds += computed * problem_.compute_cost[group];
        seconds += (problem_.steps - computed) * problem_.cached_cost[group];
    }
    return seconds;
}

double Selection::fill_group(int group, Result& result) const {
    const Steps& steps = steps_[group];
    double sum = 0.0;
    for (std::size_t at = 0; at + 1 < steps.size(); ++at) {
        if (at % 64 == 0) problem_.poll();
        const Run run = costs_.best(group, steps, at);
        sum += run.cost;
        for (int step = steps[at] + 1; step < steps[at + 1]; ++step) {
            const std::size_t cell = problem_.cell(step, group);
            result.cells[cell] = run.span;
            result.anchor[cell] = steps[at];
            result.base[cell] = run.base;
        }
    }
    return sum;
}

Result Selection::result(std::string method) const {
    Result result;
    result.steps = problem_.steps;
    result.groups = problem_.groups;
    result.cells.assign(computed_.size(), -1);
    result.anchor = result.base = result.cells;
    for (int group = 0; group < problem_.groups; ++group) result.total_error += fill_group(group, result);
    result.spent = spent();
    result.feasible = problem_.affords(result.spent);
    result.method = std::move(method);
    return result;
}

} // namespace layercache
