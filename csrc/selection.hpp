// Which cells are computed, and what adding or dropping one of them changes.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "problem.hpp"
#include "runs.hpp"

namespace layercache {

class Selection {
public:
    // The computed steps of every group; each list holds step 0 and ends with the number of steps.
    Selection(const Problem& problem, const RunCosts& costs, std::vector<Steps> computed);

    bool computed(int step, int group) const { return computed_[problem_.cell(step, group)] != 0; }
    void flip(int step, int group);

    // Error saved by computing this cell rather than caching it, everything else as it is.
    double gain(int step, int group) const;

    // First and last step whose gain depends on whether this cell is computed.
    std::pair<int, int> neighbourhood(int step, int group) const;

    double spent() const;
    double spent_with_one_more(int group) const { return spent() + problem_.saving(group); }
    Result result(std::string method) const;

private:
    // Prices the runs after the computed steps [first, last) of a group's list, as it stands now.
    void price(int group, std::size_t first, std::size_t last);

    // Sum over the runs of a window from `first` on: as priced, and for a window that is not in force.
    double priced(int group, const Steps& steps, std::size_t first) const;
    double cost(int group, const Steps& steps, std::size_t first) const;
    double fill_group(int group, Result& result) const;

    const Problem& problem_;
    const RunCosts& costs_;
    std::vector<Steps> steps_;
    std::vector<char> computed_;
    std::vector<double> run_costs_; // of the run after each computed cell
    mutable Steps window_; // scratch of gain()
};

} // namespace layercache
