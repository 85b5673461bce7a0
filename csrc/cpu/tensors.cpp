#include "tensors.hpp"

#include <unordered_map>

#include "dlpack.hpp"

namespace py = pybind11;

namespace layercache::cpu {

namespace {

struct Torch {
    std::unordered_map<PyObject*, Dtype> dtypes;
    PyTypeObject* tensor_class = nullptr;
    int (*borrow)(void*, dlpack::Tensor*) = nullptr;
    PyObject* error_class = nullptr;
    PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* shape = PyUnicode_InternFromString("shape");
    PyObject* stride = PyUnicode_InternFromString("stride");
};

Torch& torch() {
    static Torch known;
    return known;
}

template <class Sizes>
void lay_out(View& view, std::int64_t dims, const Sizes& shape, const Sizes& stride) {
    if (dims == 3) {
        view.batch = shape(0), view.rows = shape(1), view.cols = shape(2);
        view.batch_stride = stride(0), view.row_stride = stride(1);
        return;
    }
    view.batch = 1, view.batch_stride = 0;
    view.cols = dims ? shape(dims - 1) : 1;
    view.rows = 1;
    for (std::int64_t k = 0; k + 1 < dims; ++k) view.rows *= shape(k);
    view.row_stride = dims == 2 ? stride(0) : view.cols;
}

bool dtype_of(std::uint8_t code, std::uint8_t bits, Dtype& dtype) {
    if (code == dlpack::FLOAT && bits == 32)
        dtype = Dtype::float32;
    else if (code == dlpack::BFLOAT && bits == 16)
        dtype = Dtype::bfloat16;
    else if (code == dlpack::FLOAT && bits == 16)
        dtype = Dtype::float16;
    else if (code == dlpack::UINT && bits == 8)
        dtype = Dtype::byte;
    else
        return false;
    return true;
}

bool borrow(PyObject* tensor, View& view) {
    dlpack::Tensor found;
    if (!PyObject_TypeCheck(tensor, torch().tensor_class) || torch().borrow(tensor, &found) != 0) return false;
    if (!dtype_of(found.code, found.bits, view.dtype)) return false;
    view.data = found.start();
    const auto at = [](const std::int64_t* sizes) { return [sizes](std::int64_t k) { return sizes[k]; }; };
    lay_out(view, found.dims, at(found.shape), at(found.strides));
    return true;
}

bool ask(PyObject* tensor, View& view) {
    const auto dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, torch().dtype));
    const auto shape = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, torch().shape));
    const auto data = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, torch().data_ptr));
    const auto stride = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, torch().stride));
    if (!dtype || !shape || !data || !stride || !PyTuple_Check(shape.ptr()) || !PyTuple_Check(stride.ptr()))
        return false;
    const auto found = torch().dtypes.find(dtype.ptr());
    if (found == torch().dtypes.end()) return false;
    view.data = reinterpret_cast<char*>(PyLong_AsUnsignedLongLong(data.ptr()));
    view.dtype = found->second;
    const auto at = [](const py::object& tuple) {
        return [&tuple](std::int64_t k) {
            return static_cast<std::int64_t>(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), k)));
        };
    };
    lay_out(view, PyTuple_GET_SIZE(shape.ptr()), at(shape), at(stride));
    return true;
}

}  // namespace

void know_torch(const py::list& dtypes, const py::object& tensor_class, const py::object& error_class) {
    torch().error_class = py::object(error_class).release().ptr();
    for (std::size_t code = 0; code < dtypes.size() && code < 4; ++code)
        torch().dtypes[py::object(dtypes[code]).release().ptr()] = static_cast<Dtype>(code);
    torch().borrow = nullptr;
    const dlpack::Exchange* api = dlpack::exchange_of(tensor_class.ptr());
    if (!api) return;
    torch().tensor_class = reinterpret_cast<PyTypeObject*>(py::object(tensor_class).release().ptr());
    torch().borrow = api->borrow;
}

bool look_at(PyObject* tensor, View& view) {
    if (!(torch().borrow ? borrow(tensor, view) : ask(tensor, view))) return false;
    if (reinterpret_cast<std::uintptr_t>(view.data) % size_of(view.dtype) == 0) return true;
    PyErr_SetString(torch().error_class, "a tensor begins at an address that is no multiple of its element size; expected "
                                         "one that does, such as its clone()");
    throw py::error_already_set();
}

}  // namespace layercache::cpu
