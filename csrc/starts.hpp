// The two ends a greedy search can start from.
#pragma once

#include <vector>

#include "problem.hpp"
#include "runs.hpp"

namespace layercache {

std::vector<Steps> all_steps(const Problem& problem);

// The fewest computed steps per group that respect protection and run length and leave no run with an
// infinite error; of equally many, those with the smaller error. Which older residuals a run can read
// follows from the list itself, so with spans this is the best of the lists tried, not of all.
std::vector<Steps> sparsest_steps(const Problem& problem, const RunCosts& costs);

} // namespace layercache
