// Python's side of the native ops: tensors in, sums out. The caller has validated everything.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <unordered_map>

#include "kernels.hpp"
#include "loops.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;
using namespace layercache::cpu;

namespace {

// torch's dtype objects, told once by Python: there is no linkage to torch that would know them.
std::unordered_map<PyObject*, Dtype>& dtypes() {
    static std::unordered_map<PyObject*, Dtype> known;
    return known;
}

void know_dtypes(const py::list& objects) {
    for (std::size_t code = 0; code < objects.size() && code < 4; ++code)
        dtypes()[py::object(objects[code]).release().ptr()] = static_cast<Dtype>(code);
}

struct Names {
    PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* shape = PyUnicode_InternFromString("shape");
    PyObject* stride = PyUnicode_InternFromString("stride");
};

// What a tensor says of itself. Up to three dims, or contiguous ones of any number, as [batch, rows, cols].
bool look_at(PyObject* tensor, View& view) {
    static const Names names;
    const auto dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, names.dtype));
    const auto shape = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, names.shape));
    const auto data = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, names.data_ptr));
    const auto stride = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, names.stride));
    if (!dtype || !shape || !data || !stride || !PyTuple_Check(shape.ptr()) || !PyTuple_Check(stride.ptr()))
        return false;
    const auto found = dtypes().find(dtype.ptr());
    if (found == dtypes().end()) return false;
    const auto at = [](const py::object& tuple, Py_ssize_t k) {
        return static_cast<std::int64_t>(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), k)));
    };
    const Py_ssize_t dims = PyTuple_GET_SIZE(shape.ptr());
    view.data = reinterpret_cast<char*>(PyLong_AsUnsignedLongLong(data.ptr()));
    view.dtype = found->second;
    if (dims == 3) {
        view.batch = at(shape, 0), view.rows = at(shape, 1), view.cols = at(shape, 2);
        view.batch_stride = at(stride, 0), view.row_stride = at(stride, 1);
        return true;
    }
    view.batch = 1, view.batch_stride = 0;
    view.cols = dims ? at(shape, dims - 1) : 1;
    view.rows = 1;
    for (Py_ssize_t k = 0; k + 1 < dims; ++k) view.rows *= at(shape, k);
    view.row_stride = dims == 2 ? at(stride, 0) : view.cols;
    return true;
}

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<View> {
    PYBIND11_TYPE_CASTER(View, const_name("Tensor"));
    bool load(handle source, bool) {
        const bool good = look_at(source.ptr(), value);
        PyErr_Clear();
        return good;
    }
};

}  // namespace pybind11::detail

namespace {

std::pair<bool, Sums> bind_capture(const Views& outputs, const Views& inputs, const Views& residuals,
                                   const Views& previous, int statistics, std::int64_t samples, bool look,
                                   int threads) {
    Sums sums;
    const bool bad = capture(outputs, inputs, residuals, previous, statistics, samples, look, threads, sums);
    return {bad, sums};
}

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

Sums bind_modulate(const View& x, const View& scale, const View& shift, const View& z, const Views& residuals,
                   const std::vector<float>& coefficients, const std::optional<View>& previous,
                   const std::optional<View>& weight, const std::optional<View>& bias,
                   const std::optional<View>& stream, const std::vector<std::int64_t>& bounds, float eps,
                   const Views& scales, int threads) {
    std::vector<const float*> rows;
    for (const View& view : scales) rows.push_back(reinterpret_cast<const float*>(view.data));
    return modulate({x, scale, shift, z, residuals, coefficients, previous, weight, bias, stream, bounds, eps, rows},
                    threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module, py::mod_gil_not_used()) {
    using guard = py::call_guard<py::gil_scoped_release>;
    module.def("know_dtypes", &know_dtypes);
    module.def("capture", &bind_capture, guard());
    module.def("capture_compact", &bind_compact, guard());
    module.def("pair_statistics", &pair_statistics, guard());
    module.def("linear_map", &bind_map, guard());
    module.def("combination_error", &combination_error, guard());
    module.def("gram", &gram, guard());
    module.def("linear_sums", &bind_linear_sums, guard());
    module.def("router_lerp", &router_lerp, guard());
    module.def("router_lerp_backward", &router_lerp_backward, guard());
    module.def("modulate", &bind_modulate, guard());
    module.def("guidance", &guidance, guard());
    module.def("row_statistics", &row_statistics, guard());
    module.def("instruction_set", [] { return active().name; });
    module.def("use_instruction_set", [](const std::string& name) { return activate(name.c_str()); });
    module.def("parallel", [] {
#ifdef _OPENMP
        return omp_get_max_threads();
#else
        return 1;
#endif
    });
}
