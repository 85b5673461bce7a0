// Python's side of the native ops: tensors in, sums out. The caller has validated everything.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "kernels.hpp"
#include "parallel.hpp"
#include "tensors.hpp"


namespace py = pybind11;
using namespace layercache::cpu;

namespace {

// Into an fp32 tensor of as many numbers.
void put(const Sums& sums, const View& result) {
    if (result.dtype != Dtype::float32 || result.numel() != static_cast<std::int64_t>(sums.size()))
        throw std::invalid_argument("the result does not fit the statistics");
    std::transform(sums.begin(), sums.end(), reinterpret_cast<float*>(result.data),
                   [](double sum) { return static_cast<float>(sum); });
}

bool bind_capture(const Views& outputs, const Views& inputs, const Views& residuals, const Views& previous,
                  int statistics, std::int64_t samples, bool look, int threads, const std::optional<View>& result) {
    Sums sums;
    const bool bad = capture(outputs, inputs, residuals, previous, statistics, samples, look, threads, sums);
    if (result) put(sums, *result);
    return bad;
}

void bind_pair_statistics(const Views& a, const Views& b, std::int64_t samples, int threads, const View& result) {
    put(pair_statistics(a, b, samples, threads), result);
}

void bind_combination_error(const View& target, const Views& terms, const std::vector<float>& coefficients,
                            int threads, const View& result) {
    put(combination_error(target, terms, coefficients, threads), result);
}

void bind_gram(const Views& tensors, int threads, const View& result) { put(gram(tensors, threads), result); }

void bind_map(const Views& inputs, const Views& outputs, const std::vector<std::optional<float>>& coefficients,
              const std::vector<float>& factors, bool base, const std::optional<View>& gate,
              const std::vector<std::optional<View>>& scales, int threads) {
    Map map;
    map.base = base;
    map.factors = factors;
    for (const auto& c : coefficients) {
        map.coefficients.push_back(c.value_or(0.0f));
        map.used.push_back(c.has_value());
    }
    if (map.coefficients.size() != inputs.size() * outputs.size() || inputs.size() > 9 || outputs.size() > 6)
        throw std::invalid_argument("coefficients do not fit inputs and outputs");
    std::vector<const float*> rows;
    for (const auto& view : scales) rows.push_back(view ? reinterpret_cast<const float*>(view->data) : nullptr);
    linear_map(inputs, outputs, map, gate, rows, threads);
}

Sums bind_linear_sums(const Views& tensors, const std::vector<std::optional<float>>& coefficients, int threads) {
    Map map;
    for (const auto& c : coefficients) {
        map.coefficients.push_back(c.value_or(0.0f));
        map.used.push_back(c.has_value());
    }
    if (tensors.size() > 8) throw std::invalid_argument("more than eight tensors");
    return linear_sums(tensors, map, static_cast<int>(coefficients.size() / tensors.size()), threads);
}

bool bind_compact(const View& output, const View& before, const View& codes, const View& scales, bool look,
                  int threads) {
    return capture_compact(output, before, codes, reinterpret_cast<float*>(scales.data), look, threads);
}

void bind_modulate(const View& x, const View& scale, const View& shift, const View& z, const Views& residuals,
                   const std::vector<float>& coefficients, const std::optional<View>& previous,
                   const std::optional<View>& weight, const std::optional<View>& bias,
                   const std::optional<View>& stream, const std::vector<std::int64_t>& bounds, float eps,
                   const Views& scales, int threads, const std::optional<View>& result) {
    std::vector<const float*> rows;
    for (const View& view : scales) rows.push_back(reinterpret_cast<const float*>(view.data));
    const Sums sums = modulate(
        {x, scale, shift, z, residuals, coefficients, previous, weight, bias, stream, bounds, eps, rows}, threads);
    if (result) put(sums, *result);
}

bool bind_decide(const View& numerator, const View& denominator, const View& accumulated,
                 const std::vector<float>& polynomial, float threshold) {
    const auto first = [](const View& view) -> float& { return *reinterpret_cast<float*>(view.data); };
    return decide(first(numerator), first(denominator), first(accumulated), polynomial, threshold);
}

}  // namespace

PYBIND11_MODULE(_cpu, module, py::mod_gil_not_used()) {
    using guard = py::call_guard<py::gil_scoped_release>;
    module.def("know_torch", &know_torch);
    module.def("capture", &bind_capture, guard());
    module.def("capture_compact", &bind_compact, guard());
    module.def("pair_statistics", &bind_pair_statistics, guard());
    module.def("linear_map", &bind_map, guard());
    module.def("combination_error", &bind_combination_error, guard());
    module.def("gram", &bind_gram, guard());
    module.def("linear_sums", &bind_linear_sums, guard());
    module.def("router_lerp", &router_lerp, guard());
    module.def("router_lerp_backward", &router_lerp_backward, guard());
    module.def("modulate", &bind_modulate, guard());
    module.def("guidance", &guidance, guard());
    module.def("row_statistics", &row_statistics, guard());
    module.def("decide", &bind_decide, guard());
    module.def("instruction_set", [] { return active().name; });
    module.def("use_instruction_set", [](const std::string& name) { return activate(name.c_str()); });
    module.def("stream_from", [](std::int64_t bytes) { return std::exchange(streamed_from(), bytes); });
    module.def("parallel", &most_threads);
}
