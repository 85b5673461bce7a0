// Greedy solvers: drop the cheapest cells from a full schedule, or add the dearest to a sparse one.
#pragma once

#include "problem.hpp"
#include "selection.hpp"

namespace layercache {

// Both expect a normalised problem. Where the budget cannot be met they return the cheapest state
// they reached, marked as not feasible; a cell with an infinite error is never cached.
Result solve_removal(const Problem& problem);
Result solve_addition(const Problem& problem);

// Computes the cells that save most error per second, as long as one fits and saves any.
void fill(const Problem& problem, Selection& selection);

} // namespace layercache
