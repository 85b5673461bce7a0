#include "exact.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "chains.hpp"
#include "greedy.hpp"
#include "runs.hpp"
#include "selection.hpp"
#include "starts.hpp"

namespace layercache {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr std::size_t most_combinations = 500000; // looked at for one group
constexpr int bisections = 60;
// Moves of all groups up to which states of three kept steps are affordable. Above, two have to do: a forecast
// reads two residuals, and which older one it could read instead is left to the final evaluation.
constexpr double most_moves = 3e6;
constexpr double most_bytes = 4294967296.0; // that one solver's graphs may take
constexpr double most_states = std::numeric_limits<int>::max() - 1;

double seconds_of(const Problem& problem, int group, int count) {
    return count * problem.compute_cost[group] + (problem.steps - count) * problem.cached_cost[group];
}

// The largest number of computed steps of one group that the budget allows, at least 1.
int most_computed(const Problem& problem, int group) {
    int count = problem.steps;
    while (count > 1 && !problem.affords(seconds_of(problem, group, count))) --count;
    return count;
}

// What the graphs of all groups take where every state also has `per_state` bytes in each group, and `shared` bytes in
// one group at a time.
double bytes_of(const Problem& problem, int history, double per_state, double shared) {
    const double moves = 8.0 * (problem.run_limit() + 1.0);
    return Chains::size(problem, history) * (problem.groups * (moves + per_state) + shared);
}

bool fits(const Problem& problem, int history, double bytes) {
    return Chains::size(problem, history) <= most_states && bytes <= most_bytes;
}

// How many kept steps the exact solver looks at. Without spans nothing older than the anchor is read.
int exact_history(const Problem& problem) {
    const double counts = problem.steps + 1.0;
    for (const int history : {Chains::most_history, 1}) {
        if (history == 1 && !problem.spans.empty()) break;
        if (fits(problem, history, bytes_of(problem, history, 4.0 * counts, 8.0 * counts))) return history;
    }
    std::ostringstream message;
    message << "max_run of " << problem.max_run << " with " << problem.steps
            << " steps needs more memory than the exact solver may take; use a smaller max_run or history, or method "
               "'lagrangian' or 'best'";
    throw std::invalid_argument(message.str());
}

int lagrangian_history(const Problem& problem) {
    int history = exact_effort(problem) <= most_moves * problem.steps ? Chains::most_history : 2;
    while (history > 1 && !fits(problem, history, bytes_of(problem, history, 12.0, 0.0))) --history;
    return history;
}

// The least error of one group for every number of computed steps.
class CountedGroup {
public:
    CountedGroup(const Problem& problem, const RunCosts& costs, int group, int history)
        : chains_(problem, costs, group, history), counts_(most_computed(problem, group) + 1),
          best_(new double[index(0, chains_.states())]), previous_(new int[index(0, chains_.states())]) {
        for (int state = 0; state <= chains_.end(); ++state) {
            problem.poll();
            std::fill_n(&best_[index(0, state)], counts_, infinity);
        }
        best_[index(0, chains_.start())] = 0.0;
        for (int state = 0; state < chains_.end(); ++state) {
            problem.poll();
            if (!chains_.reached(state)) continue;
            for (int gap = 1; gap <= chains_.longest_gap(); ++gap) relax(state, gap);
        }
        const double* ends = &best_[index(0, chains_.end())];
        errors_.assign(ends, ends + counts_);
        best_.reset(); // the way back needs the states alone
    }

    // Infinite also for more computed steps than the budget allows.
    double error(int count) const { return count < counts_ ? errors_[count] : infinity; }

    Steps steps(int count) const {
        Steps steps{chains_.step(chains_.end())};
        for (int state = chains_.end(); count > 0; --count) {
            state = previous_[index(count, state)];
            steps.push_back(chains_.step(state));
        }
        std::reverse(steps.begin(), steps.end());
        return steps;
    }

private:
    // After `count` moves, that is with so many computed steps behind.
    std::size_t index(int count, int state) const {
        return static_cast<std::size_t>(state) * counts_ + count;
    }

    void relax(int state, int gap) {
        const double cost = chains_.cost(state, gap);
        if (!std::isfinite(cost)) return;
        const int next = chains_.next(state, gap);
        const int reached = std::min(counts_ - 1, chains_.step(state) + 1); // every move computes one step
        for (int count = 0; count < reached; ++count) {
            const double value = best_[index(count, state)] + cost;
            double& best = best_[index(count + 1, next)];
            if (value < best) {
                best = value;
                previous_[index(count + 1, next)] = state;
            }
        }
    }

    Chains chains_;
    int counts_;
    std::vector<double> errors_;      // [counts], at the end mark
    std::unique_ptr<double[]> best_;  // [states, counts]
    std::unique_ptr<int[]> previous_; // [states, counts], written where there is a path
};

// Some groups together: what they cost, and how that came about.
struct Combination {
    double seconds;
    double error;
    int count;    // computed steps of the last of the groups
    int previous; // among the combinations of the groups before it
};

// Keeps those that are better than everything cheaper.
void prune(std::vector<Combination>& combinations) {
    std::sort(combinations.begin(), combinations.end(), [](const Combination& a, const Combination& b) {
        return std::pair(a.seconds, a.error) < std::pair(b.seconds, b.error);
    });
    double least = infinity;
    const auto dominated = [&least](const Combination& c) { return c.error < least ? (least = c.error, false) : true; };
    combinations.erase(std::remove_if(combinations.begin(), combinations.end(), dominated), combinations.end());
}

// Every useful combination of the first groups and one more. Seconds the groups behind will need at least
// are kept free.
std::vector<Combination> combine(const Problem& problem, const std::vector<Combination>& before, int group,
                                 const CountedGroup& counted, double reserved) {
    std::vector<Combination> combinations;
    for (int at = 0; at < static_cast<int>(before.size()); ++at) {
        problem.poll();
        for (int count = 1; count <= problem.steps; ++count) {
            const double error = before[at].error + counted.error(count);
            const double seconds = before[at].seconds + seconds_of(problem, group, count);
            if (!std::isfinite(error) || !problem.affords(seconds + reserved)) continue;
            combinations.push_back({seconds, error, count, at});
        }
    }
    prune(combinations);
    return combinations;
}

double least_seconds(const Problem& problem, int group, const CountedGroup& counted) {
    for (int count = 1; count <= problem.steps; ++count) {
        if (std::isfinite(counted.error(count))) return seconds_of(problem, group, count);
    }
    return seconds_of(problem, group, problem.steps);
}

Result cheapest(const Problem& problem, const RunCosts& costs, const char* method) {
    return Selection(problem, costs, sparsest_steps(problem, costs)).result(method);
}

// With fewer kept steps than the problem's, a forecast may turn out to read another older step than was counted
// with, and that one may be out of the question. The greedy looks at all kept steps.
bool is_finite(const Selection& selection) { return std::isfinite(selection.result("").total_error); }

// One shortest path per multiplier, for one group.
class PricedGroup {
public:
    PricedGroup(const Problem& problem, const RunCosts& costs, int group, int history)
        : problem_(problem), chains_(problem, costs, group, history), price_(problem.saving(group)),
          best_(chains_.states()), previous_(chains_.states()) {}

    // The computed steps of least error + multiplier * seconds, with the end mark.
    Steps steps(double multiplier) {
        std::fill(best_.begin(), best_.end(), infinity);
        best_[chains_.start()] = 0.0;
        for (int state = 0; state < chains_.end(); ++state) {
            if (state % 64 == 0) problem_.poll();
            if (!std::isfinite(best_[state])) continue;
            const double here = best_[state] + multiplier * price_;
            for (int gap = 1; gap <= chains_.longest_gap(); ++gap) {
                const double value = here + chains_.cost(state, gap);
                const int next = std::isfinite(value) ? chains_.next(state, gap) : -1;
                if (next < 0 || value >= best_[next]) continue;
                best_[next] = value;
                previous_[next] = state;
            }
        }
        Steps steps{chains_.step(chains_.end())};
        for (int state = chains_.end(); state != chains_.start();) {
            state = previous_[state];
            steps.push_back(chains_.step(state));
        }
        std::reverse(steps.begin(), steps.end());
        return steps;
    }

private:
    const Problem& problem_;
    Chains chains_;
    double price_;
    std::vector<double> best_;
    std::vector<int> previous_;
};

std::vector<Steps> priced_steps(const Problem& problem, std::vector<PricedGroup>& groups, double multiplier) {
    std::vector<Steps> steps;
    for (PricedGroup& group : groups) steps.push_back(group.steps(multiplier));
    return steps;
}

} // namespace

Result solve_exact(const Problem& problem) {
    const int history = exact_history(problem);
    const RunCosts costs(problem);
    std::vector<std::unique_ptr<CountedGroup>> counted;
    double reserved = 0.0;
    for (int group = 0; group < problem.groups; ++group) {
        counted.push_back(std::make_unique<CountedGroup>(problem, costs, group, history));
        reserved += least_seconds(problem, group, *counted.back());
    }
    std::vector<std::vector<Combination>> layers{{{0.0, 0.0, 0, -1}}};
    for (int group = 0; group < problem.groups; ++group) {
        reserved -= least_seconds(problem, group, *counted[group]);
        if (layers.back().size() * static_cast<std::size_t>(problem.steps) > most_combinations) {
            return solve_lagrangian(problem);
        }
        layers.push_back(combine(problem, layers.back(), group, *counted[group], std::max(0.0, reserved)));
        if (layers.back().empty()) return cheapest(problem, costs, "exact");
    }
    // pruned by seconds, so the last has the least error
    int at = static_cast<int>(layers.back().size()) - 1;
    std::vector<Steps> computed(problem.groups);
    for (int group = problem.groups - 1; group >= 0; --group) {
        const Combination& combination = layers[group + 1][at];
        computed[group] = counted[group]->steps(combination.count);
        at = combination.previous;
    }
    const Selection selection(problem, costs, std::move(computed));
    return is_finite(selection) ? selection.result("exact") : solve_removal(problem);
}

Result solve_lagrangian(const Problem& problem) {
    const RunCosts costs(problem);
    const int history = lagrangian_history(problem);
    std::vector<PricedGroup> groups;
    for (int group = 0; group < problem.groups; ++group) groups.emplace_back(problem, costs, group, history);
    const auto selected = [&](double multiplier) {
        return Selection(problem, costs, priced_steps(problem, groups, multiplier));
    };
    double low = 0.0, high = 1e-12;
    while (!problem.affords(selected(high).spent())) {
        if (high > 1e18) return cheapest(problem, costs, "lagrangian");
        low = high;
        high *= 64.0;
    }
    for (int round = 0; round < bisections && high - low > 1e-9 * high; ++round) {
        const double middle = 0.5 * (low + high);
        (problem.affords(selected(middle).spent()) ? high : low) = middle;
    }
    Selection selection = selected(high);
    if (!is_finite(selection)) return solve_removal(problem);
    fill(problem, selection);
    return selection.result("lagrangian");
}

double exact_effort(const Problem& problem) {
    const double gap = problem.run_limit() + 1.0;
    const double kept = std::min(problem.history, static_cast<int>(Chains::most_history)) - 1.0;
    return problem.groups * std::pow(problem.steps, 2.0) * std::pow(gap + 1.0, kept) * gap;
}

} // namespace layercache
