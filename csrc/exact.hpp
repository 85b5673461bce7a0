// Solvers that look at all schedules at once instead of one move after the other.
#pragma once

#include "problem.hpp"

namespace layercache {

// Both expect a normalised problem and answer as the greedy solvers do where the budget cannot be met.

// The least error there is within the budget. Where groups with unequal costs make too many combinations
// for that, the answer is the Lagrangian one, and says so by its method. Throws std::invalid_argument where the
// graph takes more than a few gigabytes.
Result solve_exact(const Problem& problem);

// Minimises error + multiplier * seconds group by group, finds the multiplier that meets the budget, and
// spends what is left greedily. Fast for many groups; off the optimum by less than the error of one cell
// per group.
Result solve_lagrangian(const Problem& problem);

// Roughly the number of operations that solve_exact takes.
double exact_effort(const Problem& problem);

} // namespace layercache
