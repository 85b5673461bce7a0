// Greedy solvers: drop the cheapest cells from a full schedule, or add the dearest to a sparse one.
#pragma once

#include "problem.hpp"

namespace layercache {

// All three expect a normalised problem. Where the budget cannot be met they return the cheapest state
// they reached, marked as not feasible; a cell with an infinite error is never cached.
Result solve_removal(const Problem& problem);
Result solve_addition(const Problem& problem);

// Both of the above; the feasible one, then the one with the smaller error, then the removal.
Result solve_best(const Problem& problem);

} // namespace layercache
