// Several solvers on one problem.
#pragma once

#include "problem.hpp"

namespace layercache {

// Expects a normalised problem. Of both greedy solvers and an exact or Lagrangian one: a feasible answer, then
// one with the smaller error.
Result solve_best(const Problem& problem);

} // namespace layercache
