#include "greedy.hpp"

#include <cmath>
#include <cstddef>
#include <limits>
#include <queue>
#include <tuple>
#include <vector>

#include "runs.hpp"
#include "selection.hpp"
#include "starts.hpp"

namespace layercache {
namespace {

enum class Move { remove, add };

struct Candidate {
    double score; // error per second of the cell
    double cost;
    int step;
    int group;
    double gain;
};

// The order in which cells are given up; additions take them in exactly the opposite order.
bool precedes(const Candidate& a, const Candidate& b) {
    return std::tie(a.score, b.cost, b.step, a.group) < std::tie(b.score, a.cost, a.step, b.group);
}

struct LowerPriority {
    Move move;
    bool operator()(const Candidate& a, const Candidate& b) const {
        return move == Move::remove ? precedes(b, a) : precedes(a, b);
    }
};

// Candidates by score. A move changes the gains nearby. A cell that moves up is pushed again at once, one that
// falls back keeps its entry until that comes up, and is then pushed to its new place.
class Queue {
public:
    Queue(const Problem& problem, const Selection& selection, Move move)
        : problem_(problem), selection_(selection), move_(move), gains_(problem.cell(problem.steps, 0), none),
          queued_(gains_.size(), none), heap_(LowerPriority{move}) {
        for (int group = 0; group < problem.groups; ++group) refresh(group, 0, problem.steps - 1);
    }

    bool pop(Candidate& out) {
        while (!heap_.empty()) {
            problem_.poll();
            out = heap_.top();
            heap_.pop();
            const std::size_t cell = problem_.cell(out.step, out.group);
            if (out.gain != queued_[cell]) continue; // the cell has an entry further up, or had
            queued_[cell] = none;
            if (out.gain == gains_[cell]) return true;
            if (!std::isnan(gains_[cell])) push(out.step, out.group);
        }
        return false;
    }

    void moved(int step, int group) {
        const auto [first, last] = selection_.neighbourhood(step, group);
        refresh(group, first, last);
    }

private:
    static constexpr double none = std::numeric_limits<double>::quiet_NaN();

    void refresh(int group, int first, int last) {
        for (int step = first; step <= last; ++step) {
            if (step % 16 == 0) problem_.poll();
            refresh_cell(step, group);
        }
    }

    void refresh_cell(int step, int group) {
        const std::size_t cell = problem_.cell(step, group);
        const bool movable = may_move(step, group);
        const double gain = movable ? selection_.gain(step, group) : 0.0;
        // Infinite: the run would be too long or hold a cell that must not be cached.
        const bool worth = movable && (move_ == Move::remove ? std::isfinite(gain) : gain > 0.0);
        gains_[cell] = worth ? gain : none;
        const double queued = queued_[cell];
        const bool waits = move_ == Move::remove ? queued <= gain : queued >= gain;
        if (worth && !waits) push(step, group);
    }

    void push(int step, int group) {
        const std::size_t cell = problem_.cell(step, group);
        const double gain = queued_[cell] = gains_[cell];
        heap_.push({gain / problem_.saving(group), problem_.compute_cost[group], step, group, gain});
    }

    bool may_move(int step, int group) const {
        const bool computed = selection_.computed(step, group);
        return move_ == Move::add ? !computed : computed && !problem_.is_protected(step, group);
    }

    const Problem& problem_;
    const Selection& selection_;
    Move move_;
    std::vector<double> gains_;  // of every cell that is worth a move
    std::vector<double> queued_; // the gain under which the cell stands in the heap
    std::priority_queue<Candidate, std::vector<Candidate>, LowerPriority> heap_;
};

} // namespace

Result solve_removal(const Problem& problem) {
    const RunCosts costs(problem);
    Selection selection(problem, costs, all_steps(problem));
    Queue queue(problem, selection, Move::remove);
    Candidate candidate;
    while (!problem.affords(selection.spent()) && queue.pop(candidate)) {
        selection.flip(candidate.step, candidate.group);
        queue.moved(candidate.step, candidate.group);
    }
    return selection.result("removal");
}

Result solve_addition(const Problem& problem) {
    const RunCosts costs(problem);
    Selection selection(problem, costs, sparsest_steps(problem, costs));
    fill(problem, selection);
    return selection.result("addition");
}

void fill(const Problem& problem, Selection& selection) {
    Queue queue(problem, selection, Move::add);
    Candidate candidate;
    while (queue.pop(candidate)) {
        // What does not fit now never will: the sum only grows.
        if (!problem.affords(selection.spent_with_one_more(candidate.group))) continue;
        selection.flip(candidate.step, candidate.group);
        queue.moved(candidate.step, candidate.group);
    }
}

} // namespace layercache
