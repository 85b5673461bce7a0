// The scheduling problem and its answer: one pair of types for every solver.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "interrupt.hpp"

namespace layercache {

// A cell is (step, group). A cached cell reads the residual of its anchor a, the newest computed step
// of its group before it, and with a span K >= 1 also that of an older computed step b. Its error is
// looked up by the distance m = step - a and the effective span Kb = a - b (0: plain reuse).
struct Problem {
    int steps = 0;
    int groups = 0;
    int max_distance = 0;
    int max_span = 0;
    const double* errors = nullptr;    // [steps, groups, max_distance + 1, max_span + 1], the caller's
    std::vector<double> compute_cost;  // [groups], seconds of a computed cell
    std::vector<double> cached_cost;   // [groups], seconds of a cached cell
    double budget = 0.0;               // largest allowed sum of cell seconds
    std::vector<char> protected_cells; // [steps, groups], cells that are always computed
    std::vector<int> spans;            // requested spans K; 0 is always allowed
    int history = 3;                   // computed steps whose residuals are kept, the anchor included
    int max_run = 8;                   // most cached steps in a row
    double tau = 0.05;                 // least relative gain of a span over plain reuse
    Interrupt interrupt;

    void poll() const { interrupt.poll(); }

    std::size_t cell(int step, int group) const { return static_cast<std::size_t>(step) * groups + group; }

    double error(int step, int group, int distance, int span) const {
        return errors[(cell(step, group) * (max_distance + 1) + distance) * (max_span + 1) + span];
    }

    bool is_protected(int step, int group) const { return protected_cells[cell(step, group)] != 0; }

    double saving(int group) const { return compute_cost[group] - cached_cost[group]; }

    // Step 0 is computed, so that no run is longer than the other steps.
    int run_limit() const { return std::min({max_run, max_distance, steps - 1}); }

    // Rounding in the caller's own product must not cost a cell, hence the last few digits of slack.
    bool affords(double seconds) const { return seconds <= budget * (1.0 + 1e-12); }
};

struct Result {
    int steps = 0;
    int groups = 0;
    std::vector<int> cells;  // [steps, groups]: -1 computed, else the span K
    std::vector<int> anchor; // step a a cached cell reads, else -1
    std::vector<int> base;   // step b a cached cell reads, else -1
    double total_error = 0.0;
    double spent = 0.0;
    bool feasible = false;
    std::string method;
};

// Throws std::invalid_argument naming the argument at fault; then sorts the spans and protects step 0.
void normalise(Problem& problem);

} // namespace layercache
