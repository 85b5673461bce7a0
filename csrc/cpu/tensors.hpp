// Python's tensors as views; nothing here is linked with torch.
#pragma once

#include <pybind11/pybind11.h>

#include "view.hpp"

namespace layercache::cpu {

// torch's dtypes in the order of `Dtype`, its Tensor class, which may bring a quicker way to look at tensors, and the class
// of what is raised for a tensor whose memory cannot be used.
void know_torch(const pybind11::list& dtypes, const pybind11::object& tensor_class,
                const pybind11::object& error_class);

// What a tensor says of itself. Up to three dims, or contiguous ones of any number, as [batch, rows, cols]. Raises where it
// begins between two multiples of its element size.
bool look_at(PyObject* tensor, View& view);

}  // namespace layercache::cpu

namespace pybind11::detail {

template <>
struct type_caster<layercache::cpu::View> {
    PYBIND11_TYPE_CASTER(layercache::cpu::View, const_name("Tensor"));
    bool load(handle source, bool) {
        const bool good = layercache::cpu::look_at(source.ptr(), value);
        PyErr_Clear();
        return good;
    }
};

}  // namespace pybind11::detail
