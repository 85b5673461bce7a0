#include "runs.hpp"

#include <algorithm>
#include <limits>

namespace layercache {

RunCosts::RunCosts(const Problem& problem) : problem_(problem), limit_(problem.run_limit()) {
    const std::size_t spans = static_cast<std::size_t>(problem.max_span) + 1;
    // not cleared: only entries that exist are written and read, and clearing would touch every page twice
    sums_.reset(new double[problem.cell(problem.steps, 0) * (limit_ + 1) * spans]);
    for (int anchor = 0; anchor < problem.steps; ++anchor) {
        for (int group = 0; group < problem.groups; ++group) {
            problem.poll();
            double* row = &sums_[problem.cell(anchor, group) * (limit_ + 1) * spans];
            const int longest = std::min(limit_, problem.steps - 1 - anchor);
            const int widest = std::min(anchor, problem.max_span);
            std::fill_n(row, widest + 1, 0.0);
            for (int length = 1; length <= longest; ++length, row += spans) {
                for (int span = 0; span <= widest; ++span) {
                    row[spans + span] = row[span] + problem.error(anchor + length, group, length, span);
                }
            }
        }
    }
}

const double* RunCosts::run(int group, int anchor, int length) const {
    return &sums_[(problem_.cell(anchor, group) * (limit_ + 1) + length) * (problem_.max_span + 1)];
}

// Step b of a requested span is the newest kept step at least that far before the anchor, else the oldest kept
// one. The spans ascend, so that b only gets older.
Run RunCosts::best(int group, const Steps& steps, std::size_t at) const {
    const int anchor = steps[at];
    const int length = steps[at + 1] - anchor - 1;
    if (length == 0) return {};
    if (length > limit_) return {std::numeric_limits<double>::infinity(), 0, -1};

    const double* costs = run(group, anchor, length);
    const Run reuse{costs[0], 0, -1};
    Run best = reuse;
    const std::size_t kept = std::min(at, static_cast<std::size_t>(problem_.history - 1));
    std::size_t back = 0;
    for (int span : problem_.spans) {
        if (back == kept) break; // nothing older is kept
        const std::size_t newest = back;
        if (back == 0) back = 1;
        while (back < kept && steps[at - back] > anchor - span) ++back;
        const int base = steps[at - back];
        if (anchor - base > problem_.max_span) break; // the table does not reach that far
        if (back == newest) continue; // many spans come down to the same older step
        const double value = costs[anchor - base];
        if (value < best.cost) best = {value, span, base};
    }
    return best.cost > (1.0 - problem_.tau) * reuse.cost ? reuse : best;
}

} // namespace layercache
