#include "best.hpp"

#include <utility>

#include "exact.hpp"
#include "greedy.hpp"

namespace layercache {
namespace {

// Above this (about a second) the exact solver is not asked.
constexpr double most_effort = 5e8;

bool better(const Result& a, const Result& b) {
    if (a.feasible != b.feasible) return a.feasible;
    if (!a.feasible && a.spent != b.spent) return a.spent < b.spent;
    return a.total_error < b.total_error;
}

} // namespace

Result solve_best(const Problem& problem) {
    Result best = solve_removal(problem);
    Result other = solve_addition(problem);
    if (better(other, best)) best = std::move(other);
    other = exact_effort(problem) <= most_effort ? solve_exact(problem) : solve_lagrangian(problem);
    return better(other, best) ? std::move(other) : std::move(best);
}

} // namespace layercache
