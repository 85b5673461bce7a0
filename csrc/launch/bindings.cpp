// Python's side of repeated calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>

#include "calls.hpp"

namespace py = pybind11;
using namespace layercache::launch;

namespace {

// NotImplemented where the call has to be made the long way.
PyObject* repeat(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
    const auto* calls = static_cast<const Calls*>(PyCapsule_GetPointer(self, nullptr));
    try {
        PyObject* result = calls->repeat(arguments, count);
        return result || PyErr_Occurred() ? result : Py_NewRef(Py_NotImplemented);
    } catch (py::error_already_set& error) {
        error.restore();
        return nullptr;
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
}

PyMethodDef REPEAT = {"repeat", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&repeat)), METH_FASTCALL,
                      "What the call returns, made again as it was made before; NotImplemented where it was not."};

}  // namespace

PYBIND11_MODULE(_launch, module) {
    py::class_<Signature>(module, "Signature");
    py::class_<Calls>(module, "Calls")
        .def(py::init<const py::object&, const std::string&, int>(), py::arg("torch"), py::arg("library"),
             py::arg("device_type"))
        .def("look", &Calls::look)
        .def("keep", &Calls::keep)
        .def("__len__", &Calls::size)
        .def("stream", [](const Calls& calls, int device) { return reinterpret_cast<std::uintptr_t>(calls.stream(device)); },
             py::arg("device"))
        // not a method: a call through pybind11 costs more than all the rest
        .def_property_readonly("repeat", [](const py::object& self) {
            PyObject* capsule = PyCapsule_New(self.cast<Calls*>(), nullptr, [](PyObject* capsule) {
                Py_XDECREF(static_cast<PyObject*>(PyCapsule_GetContext(capsule)));
            });
            if (!capsule || PyCapsule_SetContext(capsule, py::object(self).release().ptr()))
                throw py::error_already_set();
            const auto owner = py::reinterpret_steal<py::object>(capsule);
            return py::reinterpret_steal<py::object>(PyCFunction_NewEx(&REPEAT, owner.ptr(), nullptr));
        });
}
