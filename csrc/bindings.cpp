#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "best.hpp"
#include "exact.hpp"
#include "greedy.hpp"
#include "paths.hpp"
#include "problem.hpp"
#include "surrogate.hpp"

namespace py = pybind11;

namespace layercache {

// A Python integer of any size, or the nearest int.
struct Whole {
    int value;
};

} // namespace layercache

namespace pybind11::detail {

template <>
struct type_caster<layercache::Whole> {
    PYBIND11_TYPE_CASTER(layercache::Whole, const_name("int"));

    bool load(handle source, bool) {
        const object number = reinterpret_steal<object>(PyNumber_Index(source.ptr()));
        int beyond = 0;
        const long long found = number ? PyLong_AsLongLongAndOverflow(number.ptr(), &beyond) : 0;
        PyErr_Clear();
        using Limits = std::numeric_limits<int>;
        const long long nearest = beyond > 0 ? Limits::max() : beyond < 0 ? Limits::min() : found;
        value.value = static_cast<int>(std::clamp<long long>(nearest, Limits::min(), Limits::max()));
        return static_cast<bool>(number);
    }
};

} // namespace pybind11::detail

namespace layercache {
namespace {

constexpr py::ssize_t most_entries = 1 << 30; // along one axis, so that sums of two places are ints

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Bools = py::array_t<bool, py::array::c_style | py::array::forcecast>;
using Solver = Result (*)(const Problem&);

[[noreturn]] void refuse_shape(const char* name, const std::string& expected, const py::array& array) {
    std::ostringstream message;
    message << name << " must have shape " << expected << ", got (";
    for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) message << (axis ? ", " : "") << array.shape(axis);
    message << ")";
    throw std::invalid_argument(message.str());
}

int extent(const Doubles& errors, int axis) {
    if (errors.shape(axis) <= most_entries) return static_cast<int>(errors.shape(axis));
    throw std::invalid_argument("errors must have at most " + std::to_string(most_entries) + " entries along an axis, got " +
                                std::to_string(errors.shape(axis)));
}

void read_errors(const Doubles& errors, Problem& problem) {
    const char* expected = "[steps, groups, distances + 1, spans + 1] with at least 1, 1, 2 and 1 entries";
    if (errors.ndim() != 4 || errors.size() == 0 || errors.shape(2) < 2) refuse_shape("errors", expected, errors);
    problem.steps = extent(errors, 0);
    problem.groups = extent(errors, 1);
    problem.max_distance = extent(errors, 2) - 1;
    problem.max_span = extent(errors, 3) - 1;
    problem.errors = errors.data();
}

std::vector<double> read_costs(const char* name, const Doubles& costs, const Problem& problem) {
    if (costs.ndim() != 1 || costs.shape(0) != problem.groups) {
        refuse_shape(name, "[" + std::to_string(problem.groups) + "]", costs);
    }
    return std::vector<double>(costs.data(), costs.data() + costs.size());
}

std::vector<char> read_protected(const Bools& cells, const Problem& problem) {
    if (cells.ndim() != 2 || cells.shape(0) != problem.steps || cells.shape(1) != problem.groups) {
        const std::string expected = std::to_string(problem.steps) + ", " + std::to_string(problem.groups);
        refuse_shape("protected", "[" + expected + "]", cells);
    }
    return std::vector<char>(cells.data(), cells.data() + cells.size());
}

Solver solver_of(const std::string& method) {
    if (method == "removal") return solve_removal;
    if (method == "addition") return solve_addition;
    if (method == "exact") return solve_exact;
    if (method == "lagrangian") return solve_lagrangian;
    if (method == "best") return solve_best;
    throw std::invalid_argument("method must be 'removal', 'addition', 'exact', 'lagrangian' or 'best', got '" +
                                method + "'");
}

// Lets Ctrl-C end a solver.
void look_for_signals() {
    const py::gil_scoped_acquire held;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

Result solve(const Doubles& errors, const Doubles& compute_cost, const Doubles& cached_cost, double budget,
             const Bools& protected_cells, const std::vector<Whole>& spans, Whole history, Whole max_run, double tau,
             const std::string& method) {
    const Solver solver = solver_of(method);
    Problem problem;
    read_errors(errors, problem);
    problem.compute_cost = read_costs("compute_cost", compute_cost, problem);
    problem.cached_cost = read_costs("cached_cost", cached_cost, problem);
    problem.protected_cells = read_protected(protected_cells, problem);
    problem.budget = budget;
    for (const Whole span : spans) problem.spans.push_back(span.value);
    problem.history = history.value;
    problem.max_run = max_run.value;
    problem.tau = tau;
    problem.interrupt = Interrupt(look_for_signals);

    py::gil_scoped_release released; // `errors` is held by the caller's frame, everything else is a copy
    normalise(problem);
    return solver(problem);
}

bool is_lexicographic(const std::string& mode) {
    if (mode != "sum" && mode != "lexicographic") {
        throw std::invalid_argument("mode must be 'sum' or 'lexicographic', got '" + mode + "'");
    }
    return mode == "lexicographic";
}

Path path_of(const Doubles& errors, Whole budget, double gamma, const std::string& mode, const py::object& required) {
    const char* expected = "[steps, lengths + 1, choices] with at least 1, 2 and 1 entries";
    if (errors.ndim() != 3 || errors.size() == 0 || errors.shape(1) < 2) refuse_shape("errors", expected, errors);
    PathProblem problem;
    problem.steps = extent(errors, 0);
    problem.max_length = extent(errors, 1) - 1;
    problem.choices = extent(errors, 2);
    problem.errors = errors.data();
    problem.required.assign(problem.steps, 0);
    if (!required.is_none()) {
        const auto steps = required.cast<Bools>();
        if (steps.ndim() != 1 || steps.shape(0) != problem.steps) {
            refuse_shape("required", "[" + std::to_string(problem.steps) + "]", steps);
        }
        std::copy(steps.data(), steps.data() + steps.size(), problem.required.begin());
    }
    problem.budget = budget.value;
    problem.interrupt = Interrupt(look_for_signals);
    problem.gamma = gamma;
    problem.lexicographic = is_lexicographic(mode);
    py::gil_scoped_release released; // `errors` is held by the caller's frame
    return shortest_path(problem);
}

// A read-only view that keeps the result alive.
py::array view(const py::object& self, std::vector<int> Result::*member) {
    const auto& result = self.cast<const Result&>();
    py::array_t<int> array({result.steps, result.groups}, (result.*member).data(), self);
    array.attr("flags").attr("writeable") = false;
    return array;
}

std::string describe(const Result& result) {
    std::ostringstream text;
    text << "Result(method='" << result.method << "', total_error=" << result.total_error << ", spent=" << result.spent
         << ", feasible=" << (result.feasible ? "True" : "False") << ")";
    return text.str();
}

void bind_result(py::module_& module) {
    py::class_<Result>(module, "Result", "A solved schedule; arrays are int32 [steps, groups] and read-only.")
        .def_property_readonly(
            "cells", [](const py::object& self) { return view(self, &Result::cells); }, "-1 computed, else the span K.")
        .def_property_readonly(
            "anchor", [](const py::object& self) { return view(self, &Result::anchor); },
            "Computed step a whose residual the cell reads; -1 where computed.")
        .def_property_readonly(
            "base", [](const py::object& self) { return view(self, &Result::base); },
            "Older computed step b the cell reads; -1 where there is none.")
        .def_readonly("total_error", &Result::total_error)
        .def_readonly("spent", &Result::spent)
        .def_readonly("feasible", &Result::feasible)
        .def_readonly("method", &Result::method, "The solver that found it.")
        .def("__repr__", &describe);
}

void bind_path(py::module_& module) {
    py::class_<Path>(module, "Path", "A shortest path over the steps.")
        .def_readonly("feasible", &Path::feasible)
        .def_readonly("steps", &Path::steps, "The computed steps, ascending.")
        .def_readonly("choice", &Path::choice, "Which of the parallel edges starts at each of them.")
        .def_readonly("cost", &Path::cost, "Sum of the edges' errors to the power gamma.")
        .def_readonly("curve", &Path::curve, "The cost with k computed steps, for every k up to the budget or the number of steps.");
}

std::vector<double> read_table(const char* name, const Doubles& table, py::ssize_t rows, py::ssize_t columns) {
    if (table.ndim() != 2 || table.shape(0) != rows || table.shape(1) != columns) {
        refuse_shape(name, "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]", table);
    }
    return std::vector<double>(table.data(), table.data() + table.size());
}

void check_finite(const char* name, const double* values, py::ssize_t count) {
    for (py::ssize_t k = 0; k < count; ++k) {
        if (!std::isfinite(values[k])) throw std::invalid_argument(std::string(name) + " must be finite");
    }
}

Surrogate surrogate_of(const Doubles& vectors, const Doubles& kappa, const Doubles& eta,
                       const Doubles& keep, const Doubles& weights, Whole terms, double ridge,
                       double weighting, const std::vector<int>& folds) {
    if (vectors.ndim() != 3 || vectors.size() == 0 || vectors.shape(1) < 2) {
        refuse_shape("vectors", "[pictures, steps + 1, rank] of at least one picture and step", vectors);
    }
    const py::ssize_t pictures = vectors.shape(0), steps = vectors.shape(1) - 1;
    if (weights.ndim() != 3 || weights.shape(0) != pictures || weights.shape(1) != steps ||
        weights.shape(2) != steps) {
        refuse_shape("weights", "[pictures, steps, steps]", weights);
    }
    SurrogateProblem problem;
    problem.steps = static_cast<int>(steps);
    problem.pictures = static_cast<int>(pictures);
    problem.rank = static_cast<int>(vectors.shape(2));
    problem.vectors = vectors.data();
    problem.kappa = read_table("kappa", kappa, pictures, steps);
    problem.eta = read_table("eta", eta, pictures, steps);
    problem.keep = read_table("keep", keep, pictures, steps);
    problem.weights.assign(weights.data(), weights.data() + weights.size());
    problem.terms = terms.value;
    problem.ridge = ridge;
    problem.weighting = weighting;
    problem.folds = folds;
    check_finite("vectors", vectors.data(), vectors.size());
    check_finite("kappa", kappa.data(), kappa.size());
    check_finite("eta", eta.data(), eta.size());
    check_finite("keep", keep.data(), keep.size());
    check_finite("weights", weights.data(), weights.size());
    return Surrogate(problem);
}

std::vector<StepMask> read_paths(const char* name, const Bools& paths, const Surrogate& surrogate) {
    const py::ssize_t steps = surrogate.steps();
    if (paths.ndim() != 2 || paths.shape(1) != steps) {
        refuse_shape(name, "[paths, " + std::to_string(steps) + "]", paths);
    }
    std::vector<StepMask> found;
    for (py::ssize_t path = 0; path < paths.shape(0); ++path) {
        found.emplace_back(paths.data() + path * steps, paths.data() + (path + 1) * steps);
        if (!found.back()[0]) throw std::invalid_argument(std::string(name) + " must compute step 0");
    }
    return found;
}

// A copy, as the next: a run is written into the surrogate, and threads may share one.
py::array_t<double> simulate(Surrogate surrogate, const Bools& computed, bool leave_out) {
    const std::vector<StepMask> paths = read_paths("computed", computed, surrogate);
    py::array_t<double> psnr({static_cast<py::ssize_t>(paths.size()), static_cast<py::ssize_t>(surrogate.pictures())});
    double* next = psnr.mutable_data();
    const py::gil_scoped_release released;
    const Interrupt interrupt(look_for_signals);
    for (const StepMask& path : paths) {
        interrupt.poll();
        const std::vector<double> found = surrogate.simulate(path, leave_out);
        next = std::copy(found.begin(), found.end(), next);
    }
    return psnr;
}

std::vector<std::vector<double>> forecasts(Surrogate surrogate, const Bools& computed) {
    const std::vector<StepMask> paths = read_paths("computed", computed, surrogate);
    if (paths.size() != 1) refuse_shape("computed", "one path, [1, steps]", computed);
    return surrogate.forecasts(paths[0]);
}

py::tuple explore_paths(Surrogate surrogate, const Bools& starts, const Bools& fixed, Whole limit,
                        unsigned long long seed, bool leave_out, double tail) {
    Exploration exploration;
    exploration.starts = read_paths("starts", starts, surrogate);
    if (fixed.ndim() != 1 || fixed.shape(0) != surrogate.steps()) {
        refuse_shape("fixed", "[" + std::to_string(surrogate.steps()) + "]", fixed);
    }
    exploration.fixed.assign(fixed.data(), fixed.data() + fixed.size());
    exploration.limit = limit.value;
    exploration.seed = seed;
    exploration.leave_out = leave_out;
    exploration.tail = tail;
    Explored found;
    {
        const py::gil_scoped_release released;
        found = explore(surrogate, exploration, Interrupt(look_for_signals));
    }
    const auto count = static_cast<py::ssize_t>(found.paths.size());
    py::array_t<bool> paths({count, static_cast<py::ssize_t>(surrogate.steps())});
    bool* next = paths.mutable_data();
    for (const StepMask& path : found.paths) next = std::copy(path.begin(), path.end(), next);
    return py::make_tuple(paths, py::array_t<double>(count, found.scores.data()));
}

const char* const surrogate_doc =
    R"(Simulates cached runs of whole-step schedules from the full runs' velocities, without the model.

vectors[p] are x*_0, v_0 .. v_{N-1}, first latents and velocities of picture p's full run, in any basis that keeps their
inner products, mean over elements. At a computed step the model answers a drift e with
v_i + kappa[p, i] e + eta[p, i] |e| xi, xi being orthogonal to everything else. The sampler steps
x_{i+1} = keep[p, i] x_i + sum of weights[p, i, k] u_k over k <= i; forecasts u of `terms` velocities are fitted
at every drifted step, pictures weighted by the power -weighting of what they miss. With leave_out every picture takes
the forecasts fitted to those of other folds alone; folds[p] is the one that picture p is in, by default one of its own.)";

void bind_surrogate(py::module_& module) {
    py::class_<Surrogate>(module, "Surrogate", surrogate_doc)
        .def(py::init(&surrogate_of), py::arg("vectors"), py::arg("kappa"), py::arg("eta"), py::arg("keep"),
             py::arg("weights"), py::arg("terms") = 3, py::arg("ridge") = 1e-5, py::arg("weighting") = 1.0,
             py::arg("folds") = std::vector<int>{})
        .def("simulate", &simulate, py::arg("computed"), py::arg("leave_out") = false,
             "PSNR in dB of every path and picture, [paths, pictures].")
        .def("forecasts", &forecasts, py::arg("computed"),
             "Of one path, [1, steps], the coefficients fitted at every step: of the newest velocities, newest first, and of "
             "the latents; none where the full run is not left.")
        .def("explore", &explore_paths, py::arg("starts"), py::arg("fixed"), py::arg("limit") = 900,
             py::arg("seed") = 0, py::arg("leave_out") = false, py::arg("tail") = 0.5,
             "All paths that a local search simulates and their scores, the best first.");
}

const char* const path_doc =
    R"(Choose at most `budget` computed steps so that the edges between them cost least.

errors[t, n, k] is the error of computing step t and next step t + n (or, at the end, no further one) with
the k-th forecast in between; n = 1 skips nothing and costs nothing, infinity forbids. Every error counts
to the power gamma. mode 'sum' adds them up; 'lexicographic' makes the largest as small as possible, then
the second largest, and so on. required[t] steps are always computed.)";

const char* const solve_doc =
    R"(Choose which cells to compute so that the error is small and the seconds stay within budget.

errors[i, g, m, Kb] is the error of caching step i of group g when its anchor is i - m and the older
residual lies Kb steps before the anchor (0: plain reuse). Infinity forbids caching. budget limits the
sum over cells of compute_cost[g] or cached_cost[g]. history counts the kept residuals, the anchor
included. A span is used only where it lowers a run's error by more than the share tau.

method: 'removal' drops the cell with the least error per second until the budget is met; 'addition'
starts from the fewest cells allowed and adds the one that saves most error per second, as long as one
fits and saves any; 'exact' finds the least error there is (history of more than 3 counts as 3);
'lagrangian' comes close to it, for many groups; 'best' keeps the best of the greedy two and of 'exact',
or of 'lagrangian' where that would take seconds.)";

} // namespace
} // namespace layercache

PYBIND11_MODULE(_core, module, py::mod_gil_not_used()) {
    using namespace layercache;
    module.doc() = "Schedulers in C++.";
    bind_result(module);
    bind_path(module);
    bind_surrogate(module);
    module.def("shortest_path", &path_of, path_doc, py::arg("errors"), py::arg("budget"), py::arg("gamma") = 5.0,
               py::arg("mode") = "sum", py::arg("required") = py::none());
    module.def("solve", &solve, solve_doc, py::arg("errors"), py::arg("compute_cost"), py::arg("cached_cost"),
               py::arg("budget"), py::arg("protected"), py::arg("spans"), py::arg("history") = 3,
               py::arg("max_run") = 8, py::arg("tau") = 0.05, py::arg("method") = "best");
}
