// Runs of whole-step schedules simulated from the full runs' velocities, without the model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "interrupt.hpp"

namespace layercache {

// A cached run lives in the span of x*_0, v_0 .. v_{N-1} (latents and velocities of the full run) and of directions
// xi_0 .. xi_{N-1}, orthonormal and across all of them. At a computed step the model gives, of the drift e = x - x*,
//     F_i = v_i + kappa_i e_i + eta_i |e_i| xi_i,
// the sampler steps x_{i+1} = keep_i x_i + sum_{k <= i} w_ik u_k with the velocities u it is given, and at every drifted
// step the forecast F_0 + sum_k d_k (F_k - F_0) + b F_0 + a x is fitted to the velocity that takes the run back to the
// full one, v_i - (keep_i e_i + sum_{k < i} w_ik (u_k - v_k)) / w_ii, over all pictures, reweighted as in
// layercache/planning/fit.py.
struct SurrogateProblem {
    int steps = 0;
    int pictures = 0;
    int rank = 0;                  // of the space that the full runs lie in
    const double* vectors = nullptr; // [pictures, steps + 1, rank], x*_0 and the velocities; the caller's, copied
    std::vector<double> kappa;     // [pictures, steps]
    std::vector<double> eta;       // [pictures, steps]
    std::vector<double> keep;      // [pictures, steps]
    std::vector<double> weights;   // [pictures, steps, steps], w; lower triangles are looked at
    int terms = 3;                 // velocities that a forecast combines
    double ridge = 1e-5;           // relative to the mean square of each term
    double weighting = 1.0;        // pictures count with the power -weighting of what they miss; 0: all the same
    std::vector<int> folds;        // [pictures], which of them are left out together; each alone if empty
};

using StepMask = std::vector<char>; // [steps], whether each is computed

class Surrogate {
public:
    // Throws std::invalid_argument naming the argument at fault.
    explicit Surrogate(const SurrogateProblem& problem);

    int steps() const { return problem_.steps; }
    int pictures() const { return problem_.pictures; }

    // PSNR of every picture's latents in dB, of a range of 2, at most 100; step 0 must be computed. Left out, a picture
    // takes the forecasts that are fitted, step by step, to the pictures of the other folds alone.
    std::vector<double> simulate(const StepMask& computed, bool leave_out = false);

    // The forecasts that are fitted on the way, per step: coefficients of the newest velocities that the model gave,
    // newest first, and of the latents; empty where the full run is not left.
    std::vector<std::vector<double>> forecasts(const StepMask& computed);

private:
    struct Run { // of one picture: vectors of `width` numbers
        std::vector<double> drift;             // e
        std::vector<std::vector<double>> made; // the newest velocities that the model gave, newest first
        std::vector<double> latents;           // x
        std::vector<double> ahead;             // e_{i+1}, were the velocity the full run's
        std::vector<double> wanted;            // v_i - ahead / w_ii
        std::vector<std::vector<double>> off;  // u_k - v_k of every step, if the sampler looks back
    };

    void answer(std::vector<Run>& runs, int step);
    void begin(std::vector<Run>& runs, int step);
    void note_products(int step, int count, std::size_t picture);
    double missed(int terms, std::size_t picture) const;
    void fit(int count, int left_out);
    std::vector<double> forecast(int count) const;
    void take(Run& run, int step, int count, std::size_t picture);

    SurrogateProblem problem_;
    std::size_t width_;              // of a vector: the rank, and coefficients of the xi
    std::vector<double> reference_;  // [pictures, steps, width], x*_i
    std::vector<double> velocities_; // [pictures, steps, width], v_i
    std::vector<Run> runs_;          // of the pictures, by the path that is simulated
    std::vector<Run> left_out_;      // the same, of pictures that are left out
    bool looks_back_ = false;        // some step takes velocities of earlier ones
    int folds_ = 0;
    int first_ = 0;                  // drifted step of the path that is simulated
    std::vector<double> products_;   // [pictures, terms + 2, terms + 2], of the forecast's terms and its target
    std::vector<double> solution_;   // [count + 1], d, b and a
    std::vector<std::vector<double>> forecasts_; // [steps], of all pictures
};

// Paths that were simulated, the best first.
struct Explored {
    std::vector<StepMask> paths;
    std::vector<double> scores;
};

struct Exploration {
    std::vector<StepMask> starts; // all of one number of computed steps
    StepMask fixed;               // [steps], those that stay as they are in the starts
    int limit = 900; // simulations
    std::uint64_t seed = 0;
    bool leave_out = false;
    double tail = 0.5;
};

// Local search by exchanges of a computed step for a skipped one, shifts of at most 2 steps first, from every start
// in the order of their scores: (1 - tail) mean + tail 10 % quantile of the PSNR. Throws std::invalid_argument.
Explored explore(Surrogate& surrogate, const Exploration& exploration, const Interrupt& interrupt);

} // namespace layercache
