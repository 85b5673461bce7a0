#include "surrogate.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>

namespace layercache {
namespace {

constexpr double best_psnr = 100.0;
constexpr int most_terms = 8;
constexpr int solves = 3;
constexpr double weight_floor = 1e-3; // of the mean square, added to what every picture misses

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

void check(const SurrogateProblem& problem) {
    if (problem.terms < 1 || problem.terms > most_terms) {
        refuse("terms must be from 1 to 8, got " + std::to_string(problem.terms));
    }
    if (!(problem.ridge > 0.0)) refuse("ridge must be above 0, got " + std::to_string(problem.ridge));
    if (!(problem.weighting >= 0.0)) refuse("weighting must be at least 0, got " + std::to_string(problem.weighting));
    if (!problem.folds.empty() && problem.folds.size() != static_cast<std::size_t>(problem.pictures)) {
        refuse("folds must have an entry for every picture");
    }
    for (const int fold : problem.folds) {
        if (fold < 0 || fold >= problem.pictures) refuse("folds must be from 0 to one less than the pictures");
    }
    const std::size_t steps = problem.steps;
    for (std::size_t at = 0; at < problem.pictures * steps; ++at) {
        if (problem.weights[at * steps + at % steps] == 0.0) {
            refuse("weights must not be 0 on their diagonals, and are at step " + std::to_string(at % steps));
        }
    }
}

// With four accumulators, so that an addition need not wait for the one before.
double product(const double* a, const double* b, std::size_t width) {
    std::array<double, 4> sums{};
    std::size_t k = 0;
    for (; k + 4 <= width; k += 4) {
        for (std::size_t lane = 0; lane < 4; ++lane) sums[lane] += a[k + lane] * b[k + lane];
    }
    for (; k < width; ++k) sums[0] += a[k] * b[k];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// to += factor * from
void add(double* to, const double* from, double factor, std::size_t width) {
    for (std::size_t k = 0; k < width; ++k) to[k] += factor * from[k];
}

using Row = std::array<double, most_terms + 2>;

// argmin |A d - t|^2 + ridge sum_k g_kk d_k^2 from G = A^T A and A^T t, in `right`; terms of zero get 0.
void solve_ridge(std::vector<Row>& gram, std::vector<double>& right, double ridge) {
    const int count = static_cast<int>(right.size());
    std::vector<double> scale(count);
    double largest = 0.0;
    for (int k = 0; k < count; ++k) {
        scale[k] = std::sqrt(std::max(gram[k][k], 0.0));
        largest = std::max(largest, scale[k]);
    }
    for (int k = 0; k < count; ++k) {
        if (!(scale[k] > 1e-12 * std::max(largest, 1e-30))) scale[k] = 0.0;
    }
    for (int k = 0; k < count; ++k) {
        const double own = scale[k];
        right[k] = own > 0.0 ? right[k] / own : 0.0;
        for (int l = 0; l < count; ++l) {
            const double both = own * scale[l];
            gram[k][l] = both > 0.0 ? gram[k][l] / both : 0.0;
        }
        gram[k][k] += own > 0.0 ? ridge : 1.0;
    }
    for (int pivot = 0; pivot < count; ++pivot) { // positive definite: no exchanges
        for (int k = pivot + 1; k < count; ++k) {
            const double factor = gram[k][pivot] / gram[pivot][pivot];
            for (int l = pivot; l < count; ++l) gram[k][l] -= factor * gram[pivot][l];
            right[k] -= factor * right[pivot];
        }
    }
    for (int k = count - 1; k >= 0; --k) {
        for (int l = k + 1; l < count; ++l) right[k] -= gram[k][l] * right[l];
        right[k] /= gram[k][k];
    }
    for (int k = 0; k < count; ++k) right[k] = scale[k] > 0.0 ? right[k] / scale[k] : 0.0;
}

double score_of(std::vector<double> psnr, double tail) {
    const double mean = std::accumulate(psnr.begin(), psnr.end(), 0.0) / static_cast<double>(psnr.size());
    std::sort(psnr.begin(), psnr.end());
    const double place = 0.1 * static_cast<double>(psnr.size() - 1); // between two of them, linearly, as NumPy does
    const auto low = static_cast<std::size_t>(place);
    const double high = psnr[std::min(low + 1, psnr.size() - 1)];
    const double quantile = psnr[low] + (place - static_cast<double>(low)) * (high - psnr[low]);
    return (1.0 - tail) * mean + tail * quantile;
}

} // namespace

Surrogate::Surrogate(const SurrogateProblem& problem) : problem_(problem) {
    check(problem);
    const std::size_t steps = problem.steps, rank = problem.rank;
    width_ = rank + steps;
    reference_.assign(problem.pictures * steps * width_, 0.0);
    velocities_.assign(problem.pictures * steps * width_, 0.0);
    for (std::size_t picture = 0; picture < static_cast<std::size_t>(problem.pictures); ++picture) {
        const double* vectors = problem.vectors + picture * (steps + 1) * rank;
        for (std::size_t step = 0; step < steps; ++step) {
            std::copy_n(vectors + (step + 1) * rank, rank, &velocities_[(picture * steps + step) * width_]);
            double* here = &reference_[(picture * steps + step) * width_];
            if (step == 0) {
                std::copy_n(vectors, rank, here);
                continue;
            }
            const std::size_t before = picture * steps + step - 1;
            add(here, here - width_, problem.keep[before], width_);
            for (std::size_t k = 0; k < step; ++k) {
                const double weight = problem.weights[before * steps + k];
                if (weight != 0.0) add(here, &velocities_[(picture * steps + k) * width_], weight, width_);
            }
        }
    }
    for (std::size_t row = 0; row < problem.pictures * steps; ++row) {
        const double* weights = &problem.weights[row * steps];
        looks_back_ = looks_back_ || std::any_of(weights, weights + row % steps, [](double w) { return w != 0.0; });
    }
    const std::vector<double> none(width_);
    const std::vector<std::vector<double>> made(problem.terms, none), off(looks_back_ ? steps : 0, none);
    runs_.assign(problem.pictures, {none, made, none, none, none, off});
    left_out_ = runs_;
    if (problem_.folds.empty()) {
        problem_.folds.resize(problem.pictures);
        std::iota(problem_.folds.begin(), problem_.folds.end(), 0);
    }
    folds_ = 1 + *std::max_element(problem_.folds.begin(), problem_.folds.end());
    problem_.vectors = nullptr; // the caller's, which were copied
    products_.resize(static_cast<std::size_t>(problem.pictures) * (problem.terms + 2) * (problem.terms + 2));
}

// What the model gives at a step becomes the newest velocity.
void Surrogate::answer(std::vector<Run>& runs, int step) {
    const std::size_t steps = problem_.steps;
    for (std::size_t picture = 0; picture < runs.size(); ++picture) {
        Run& run = runs[picture];
        const std::size_t at = picture * steps + step;
        std::rotate(run.made.begin(), run.made.end() - 1, run.made.end());
        std::vector<double>& newest = run.made.front();
        std::copy_n(&velocities_[at * width_], width_, newest.begin());
        const double drifted = std::sqrt(std::max(product(run.drift.data(), run.drift.data(), width_), 0.0));
        if (drifted == 0.0) continue;
        add(newest.data(), run.drift.data(), problem_.kappa[at], width_);
        newest[problem_.rank + step] += problem_.eta[at] * drifted;
    }
}

// Latents at a step, and where the sampler goes from them.
void Surrogate::begin(std::vector<Run>& runs, int step) {
    const std::size_t steps = problem_.steps;
    for (std::size_t picture = 0; picture < runs.size(); ++picture) {
        Run& run = runs[picture];
        const std::size_t at = picture * steps + step;
        std::copy_n(&reference_[at * width_], width_, run.latents.begin());
        add(run.latents.data(), run.drift.data(), 1.0, width_);
        std::fill(run.ahead.begin(), run.ahead.end(), 0.0);
        add(run.ahead.data(), run.drift.data(), problem_.keep[at], width_);
        for (int k = looks_back_ ? first_ : step; k < step; ++k) {
            const double weight = problem_.weights[at * steps + k];
            if (weight != 0.0) add(run.ahead.data(), run.off[k].data(), weight, width_);
        }
    }
}

// Inner products of the step's terms, F_k - F_0 for k = 1 .. count - 1, F_0 and x, and of the target less F_0.
void Surrogate::note_products(int step, int count, std::size_t picture) {
    const std::size_t steps = problem_.steps, at = (picture * steps + step) * width_;
    const double weight = problem_.weights[(picture * steps + step) * steps + step];
    Run& run = runs_[picture];
    std::copy_n(&velocities_[at], width_, run.wanted.begin());
    add(run.wanted.data(), run.ahead.data(), -1.0 / weight, width_);

    std::array<const double*, most_terms + 2> vectors{}; // in the order of the terms, each less F_0 or not
    for (int k = 1; k < count; ++k) vectors[k - 1] = run.made[k].data();
    vectors[count - 1] = run.made[0].data();
    vectors[count] = run.latents.data();
    vectors[count + 1] = run.wanted.data();
    const auto is_difference = [count](int k) { return k < count - 1 || k == count + 1; };
    std::array<Row, most_terms + 2> raw{};
    for (int k = 0; k < count + 2; ++k) {
        for (int l = k; l < count + 2; ++l) raw[k][l] = raw[l][k] = product(vectors[k], vectors[l], width_);
    }
    const int side = problem_.terms + 2, newest = count - 1;
    double* products = &products_[picture * side * side];
    for (int k = 0; k < count + 2; ++k) {
        for (int l = 0; l < count + 2; ++l) {
            double value = raw[k][l];
            if (is_difference(k)) value -= raw[newest][l];
            if (is_difference(l)) value -= raw[k][newest];
            if (is_difference(k) && is_difference(l)) value += raw[newest][newest];
            products[k * side + l] = value;
        }
    }
}

// What a picture's forecast with solution_ leaves of its target, squared.
double Surrogate::missed(int terms, std::size_t picture) const {
    const int side = problem_.terms + 2;
    const double* products = &products_[picture * side * side];
    double left = products[terms * side + terms];
    for (int k = 0; k < terms; ++k) {
        left -= 2.0 * solution_[k] * products[k * side + terms];
        for (int l = 0; l < terms; ++l) left += solution_[k] * solution_[l] * products[k * side + l];
    }
    return std::max(left, 0.0);
}

// Coefficients d, b and a of the step's forecast, from `count` velocities of all pictures but a fold's, into solution_.
void Surrogate::fit(int count, int left_out) {
    const int terms = count + 1, side = problem_.terms + 2;
    std::vector<std::size_t> pictures;
    for (std::size_t picture = 0; picture < runs_.size(); ++picture) {
        if (problem_.folds[picture] != left_out) pictures.push_back(picture);
    }
    std::vector<double> weights(pictures.size(), 1.0 / static_cast<double>(pictures.size())), left(pictures.size());
    std::vector<Row> gram(terms);
    for (int round = 0; round < (problem_.weighting > 0.0 ? solves : 1); ++round) {
        solution_.assign(terms, 0.0);
        for (Row& row : gram) row.fill(0.0);
        for (std::size_t at = 0; at < pictures.size(); ++at) {
            const double* products = &products_[pictures[at] * side * side];
            for (int k = 0; k < terms; ++k) {
                for (int l = 0; l < terms; ++l) gram[k][l] += weights[at] * products[k * side + l];
                solution_[k] += weights[at] * products[k * side + terms];
            }
        }
        solve_ridge(gram, solution_, problem_.ridge);
        for (std::size_t at = 0; at < pictures.size(); ++at) left[at] = missed(terms, pictures[at]);
        const double mean = std::accumulate(left.begin(), left.end(), 0.0) / static_cast<double>(pictures.size());
        if (!(mean > 0.0)) return;
        for (std::size_t at = 0; at < pictures.size(); ++at) {
            weights[at] = std::pow(left[at] / mean + weight_floor, -problem_.weighting);
        }
        const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
        for (double& weight : weights) weight /= sum;
    }
}

// The forecast of solution_ as coefficients of `count` velocities and of the latents.
std::vector<double> Surrogate::forecast(int count) const {
    std::vector<double> found(count + 1);
    found[0] = 1.0 + solution_[count - 1];
    for (int k = 1; k < count; ++k) {
        found[0] -= solution_[k - 1];
        found[k] = solution_[k - 1];
    }
    found[count] = solution_[count];
    return found;
}

// A picture takes the step with the velocity that was fitted.
void Surrogate::take(Run& run, int step, int count, std::size_t picture) {
    const std::size_t steps = problem_.steps, at = picture * steps + step;
    const std::vector<double> coefficients = forecast(count);
    const double* velocity = &velocities_[at * width_];
    const double weight = problem_.weights[at * steps + step];
    std::array<const double*, most_terms> made{};
    for (int k = 0; k < count; ++k) made[k] = run.made[k].data();
    std::swap(run.drift, run.ahead);
    for (std::size_t number = 0; number < width_; ++number) {
        double off = coefficients[count] * run.latents[number] - velocity[number];
        for (int k = 0; k < count; ++k) off += coefficients[k] * made[k][number];
        run.drift[number] += weight * off;
        if (looks_back_) run.off[step][number] = off;
    }
}

std::vector<double> Surrogate::simulate(const StepMask& computed, bool leave_out) {
    const std::size_t steps = problem_.steps;
    if (computed.size() != steps || !computed[0]) refuse("a path has an entry for every step, and computes step 0");
    if (leave_out && folds_ < 2) refuse("there is one fold of pictures, and none to fit to once it is left out");
    for (std::vector<Run>* runs : {&runs_, &left_out_}) {
        for (Run& run : *runs) std::fill(run.drift.begin(), run.drift.end(), 0.0);
    }
    int count = 0;
    first_ = problem_.steps;
    forecasts_.assign(steps, {});
    for (int step = 0; step < problem_.steps; ++step) {
        if (computed[step]) {
            answer(runs_, step);
            if (leave_out) answer(left_out_, step);
            count = std::min(count + 1, problem_.terms);
            if (first_ > step) continue; // as in the full run
        }
        first_ = std::min(first_, step);
        begin(runs_, step);
        for (std::size_t picture = 0; picture < runs_.size(); ++picture) note_products(step, count, picture);
        if (leave_out) {
            begin(left_out_, step);
            for (int fold = 0; fold < folds_; ++fold) {
                fit(count, fold);
                for (std::size_t picture = 0; picture < runs_.size(); ++picture) {
                    if (problem_.folds[picture] == fold) take(left_out_[picture], step, count, picture);
                }
            }
        }
        fit(count, -1);
        forecasts_[step] = forecast(count);
        for (std::size_t picture = 0; picture < runs_.size(); ++picture) take(runs_[picture], step, count, picture);
    }
    std::vector<double> psnr;
    for (const Run& run : leave_out ? left_out_ : runs_) {
        const double error = product(run.drift.data(), run.drift.data(), width_) / 4.0;
        psnr.push_back(-10.0 * std::log10(std::max(error, std::pow(10.0, -best_psnr / 10.0))));
    }
    return psnr;
}

std::vector<std::vector<double>> Surrogate::forecasts(const StepMask& computed) {
    simulate(computed);
    return forecasts_;
}

namespace {

class Explorer {
public:
    Explorer(Surrogate& surrogate, const Exploration& exploration, const Interrupt& interrupt)
        : surrogate_(surrogate), exploration_(exploration), interrupt_(interrupt), random_(exploration.seed) {}

    Explored run() {
        std::vector<std::pair<double, StepMask>> starts;
        for (const StepMask& start : exploration_.starts) {
            if (const double* score = try_path(start)) starts.emplace_back(*score, start);
        }
        std::stable_sort(starts.begin(), starts.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
        for (auto& [score, path] : starts) {
            while (climb(path, score)) {}
        }
        return sorted();
    }

private:
    using Move = std::pair<int, int>; // a computed step, and the skipped one that takes its place

    // The score of a path that was not simulated before; null for one that was, or where the limit is reached.
    const double* try_path(const StepMask& path) {
        if (static_cast<int>(found_.paths.size()) >= exploration_.limit || !known_.insert(path).second) return nullptr;
        interrupt_.poll();
        found_.paths.push_back(path);
        found_.scores.push_back(score_of(surrogate_.simulate(path, exploration_.leave_out), exploration_.tail));
        return &found_.scores.back();
    }

    bool climb(StepMask& path, double& score) {
        for (const Move& move : moves(path)) {
            std::swap(path[move.first], path[move.second]);
            const double* found = try_path(path);
            if (found != nullptr && *found > score) {
                score = *found;
                return true;
            }
            std::swap(path[move.first], path[move.second]);
        }
        return false;
    }

    std::vector<Move> moves(const StepMask& path) {
        std::vector<Move> near, far;
        const int steps = static_cast<int>(path.size());
        for (int out = 1; out < steps; ++out) {
            for (int into = 1; into < steps; ++into) {
                if (!path[out] || path[into] || exploration_.fixed[out] || exploration_.fixed[into]) continue;
                (std::abs(out - into) <= 2 ? near : far).emplace_back(out, into);
            }
        }
        shuffle(near);
        shuffle(far);
        near.insert(near.end(), far.begin(), far.end());
        return near;
    }

    // std::shuffle differs between libraries.
    void shuffle(std::vector<Move>& moves) {
        for (std::size_t k = moves.size(); k > 1; --k) std::swap(moves[k - 1], moves[random_() % k]);
    }

    Explored sorted() const {
        std::vector<std::size_t> order(found_.paths.size());
        std::iota(order.begin(), order.end(), 0);
        const auto is_better = [this](std::size_t a, std::size_t b) { return found_.scores[a] > found_.scores[b]; };
        std::stable_sort(order.begin(), order.end(), is_better);
        Explored result;
        for (const std::size_t k : order) {
            result.paths.push_back(found_.paths[k]);
            result.scores.push_back(found_.scores[k]);
        }
        return result;
    }

    Surrogate& surrogate_;
    const Exploration& exploration_;
    const Interrupt& interrupt_;
    std::mt19937_64 random_;
    std::set<StepMask> known_;
    Explored found_;
};

} // namespace

Explored explore(Surrogate& surrogate, const Exploration& exploration, const Interrupt& interrupt) {
    if (exploration.starts.empty()) refuse("explore needs a path to start from");
    return Explorer(surrogate, exploration, interrupt).run();
}

} // namespace layercache
