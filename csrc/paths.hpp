// Whole steps as a shortest path: nodes are computed steps, edges the skipped steps between two of them.
#pragma once

#include <cstddef>
#include <vector>

#include "interrupt.hpp"

namespace layercache {

// An edge starts at a computed step t, spans `length` steps and ends at the next computed one, or behind the
// last step. Parallel edges differ in the forecast that is used on them. An edge of length 1 skips nothing.
struct PathProblem {
    int steps = 0;
    int max_length = 0;
    int choices = 0;
    const double* errors = nullptr; // [steps, max_length + 1, choices], the caller's; infinity forbids the edge
    std::vector<char> required;     // [steps], steps that are always computed
    int budget = 0;                 // most computed steps; more than there are is no limit
    double gamma = 1.0;             // power of every error
    bool lexicographic = false;     // least largest error, then second largest, and so on, instead of the least sum
    Interrupt interrupt;

    double error(int start, int length, int choice) const {
        return errors[(static_cast<std::size_t>(start) * (max_length + 1) + length) * choices + choice];
    }
};

struct Path {
    bool feasible = false;
    std::vector<int> steps;    // computed, ascending
    std::vector<int> choice;   // of the edge that starts at each of them
    double cost = 0.0;         // sum of errors to the power gamma
    std::vector<double> curve; // [min(budget, steps) + 1]: the same for every number of computed steps, infinite where
                               // there is none
};

// Throws std::invalid_argument naming the argument at fault.
Path shortest_path(const PathProblem& problem);

} // namespace layercache
