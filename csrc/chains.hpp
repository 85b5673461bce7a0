// All lists of computed steps of one group as paths through a graph.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "problem.hpp"
#include "runs.hpp"

namespace layercache {

// A state is the last computed step and the gaps to those before it that a forecast may read, so that the
// cost of the next run follows from the state alone. A move computes a later step next; the last move leads
// to the end mark.
class Chains {
public:
    // `history` kept steps are looked at, 3 at most. Expects a `size` that an int holds.
    Chains(const Problem& problem, const RunCosts& costs, int group, int history);

    static constexpr int most_history = 3;

    // Number of states.
    static double size(const Problem& problem, int history);

    int states() const { return steps_ * width_ + 1; }
    int start() const { return 0; }
    int end() const { return steps_ * width_; }
    int longest_gap() const { return longest_gap_; }
    int step(int state) const { return state / width_; }

    // Whether moves from the start lead here.
    bool reached(int state) const { return reached_[state] != 0; }

    // Infinite where the move is not allowed; only of a state that is reached.
    double cost(int state, int gap) const { return costs_[static_cast<std::size_t>(state) * longest_gap_ + gap - 1]; }
    int next(int state, int gap) const;

private:
    void cost_moves(const Problem& problem, const RunCosts& costs, int group, int state);
    void write_steps(int state, Steps& steps) const;

    int steps_;
    int history_;
    int longest_gap_;
    int width_;
    std::vector<char> reached_;       // [states]
    std::unique_ptr<double[]> costs_; // [states, gaps], written where a state is reached
};

} // namespace layercache
