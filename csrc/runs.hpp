// What a run of cached steps costs in error, and which span serves it best.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "problem.hpp"

namespace layercache {

struct Run {
    double cost = 0.0; // infinite where the run is too long or must not be cached
    int span = 0;
    int base = -1; // step b, -1 with span 0
};

// Computed steps of one group in ascending order, closed by the number of steps as an end mark, so
// that every run lies between two neighbours. A window of such a list serves as well.
using Steps = std::vector<int>;

class RunCosts {
public:
    explicit RunCosts(const Problem& problem);

    // The cached steps between steps[at] and steps[at + 1]; the entries before `at` are what older
    // residuals there are.
    Run best(int group, const Steps& steps, std::size_t at) const;

private:
    // Error of the cached steps anchor + 1 .. anchor + length, by effective span.
    const double* run(int group, int anchor, int length) const;

    const Problem& problem_;
    int limit_;
    std::unique_ptr<double[]> sums_; // [anchor, group, length, effective span], errors added up along a run
};

} // namespace layercache
