// The part of DLPack's C exchange API (1.3) that is used here: a tensor's fields without a Python call.
#pragma once

#include <Python.h>

#include <cstdint>

namespace layercache::dlpack {

constexpr std::uint8_t UINT = 1, FLOAT = 2, BFLOAT = 4;  // type codes
constexpr std::int32_t CPU = 1;                          // device type

struct Tensor {
    void* data;
    std::int32_t device_type, device_id, dims;
    std::uint8_t code, bits;
    std::uint16_t lanes;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;

    char* start() const { return static_cast<char*>(data) + byte_offset; }
};

struct Exchange {
    std::uint32_t major, minor;
    Exchange* previous;
    void *allocate, *take, *give;
    int (*borrow)(void* tensor, Tensor* out);  // may be null; 0, or an error is set
};

// What a tensor class brings, or null; no error is set.
inline const Exchange* exchange_of(PyObject* tensor_class) {
    PyObject* capsule = PyObject_GetAttrString(tensor_class, "__dlpack_c_exchange_api__");
    const void* found = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
    Py_XDECREF(capsule);
    PyErr_Clear();
    const auto* api = static_cast<const Exchange*>(found);
    return api && api->major == 1 ? api : nullptr;
}

}  // namespace layercache::dlpack
