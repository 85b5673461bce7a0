#include "signature.hpp"

#include <cmath>

namespace layercache::launch {

namespace {

enum Word : std::uint64_t { NOTHING = 1, NO, YES, NUMBER, INTEGER, SEQUENCE, TENSOR, NEIGHBOURS };

class Reader {
  public:
    Reader(const Torch& torch, Signature& signature) : torch_(torch), out_(signature) {}

    bool read(PyObject* argument) {
        if (Py_TYPE(argument) == reinterpret_cast<PyTypeObject*>(torch_.tensor) ||
            Py_TYPE(argument) == reinterpret_cast<PyTypeObject*>(torch_.parameter))
            return read_tensor(argument);
        if (argument == Py_None) return put(NOTHING);
        if (PyList_CheckExact(argument) || PyTuple_CheckExact(argument)) return read_sequence(argument);
        if (PyFloat_Check(argument)) return read_number(PyFloat_AS_DOUBLE(argument));
        if (argument == Py_True) return put(YES);
        if (argument == Py_False) return put(NO);
        return PyLong_CheckExact(argument) && read_integer(argument);
    }

    // Where the tensors are, and how those lie that share memory; all others may lie anywhere.
    bool relate() {
        const auto& tensors = out_.tensors;
        put(static_cast<std::uint64_t>(out_.device));
        for (std::size_t j = 1; j < tensors.size(); ++j)
            for (std::size_t i = 0; i < j; ++i)
                if (tensors[i].start < tensors[j].end && tensors[j].start < tensors[i].end) {
                    const std::uint64_t same = tensors[i].object == tensors[j].object;
                    put(NEIGHBOURS | i << 8 | j << 32 | same << 63);
                    put(static_cast<std::uint64_t>(tensors[j].start - tensors[i].start));
                }
        return true;
    }

  private:
    bool put(std::uint64_t word) {
        out_.words.push_back(word);
        return true;
    }

    bool read_sequence(PyObject* sequence) {
        const Py_ssize_t size = PySequence_Fast_GET_SIZE(sequence);
        put(SEQUENCE | static_cast<std::uint64_t>(size) << 8);
        PyObject** items = PySequence_Fast_ITEMS(sequence);
        for (Py_ssize_t k = 0; k < size; ++k)
            if (!read(items[k])) return false;
        return true;
    }

    bool read_number(double value) {
        out_.numbers.push_back(static_cast<float>(value));
        return std::isfinite(value) && put(NUMBER);
    }

    bool read_integer(PyObject* integer) {
        int overflow = 0;
        const long long value = PyLong_AsLongLongAndOverflow(integer, &overflow);
        put(INTEGER);
        return !overflow && put(static_cast<std::uint64_t>(value));
    }

    bool read_tensor(PyObject* tensor) {
        dlpack::Tensor found;
        if (torch_.exchange->borrow(tensor, &found) != 0) return false;
        if (found.device_type != torch_.device_type) return false;
        if (out_.device < 0) out_.device = found.device_id;
        if (found.device_id != out_.device || has_gradient(tensor)) return false;
        char* start = found.start();
        put(TENSOR | static_cast<std::uint64_t>(found.code) << 8 | static_cast<std::uint64_t>(found.bits) << 16 |
            static_cast<std::uint64_t>(found.lanes) << 24 | static_cast<std::uint64_t>(found.dims) << 40 |
            (reinterpret_cast<std::uintptr_t>(start) & 15) << 56);
        std::int64_t last = 0, count = 1;
        for (std::int32_t k = 0; k < found.dims; ++k) {
            put(static_cast<std::uint64_t>(found.shape[k]));
            put(static_cast<std::uint64_t>(found.strides[k]));
            last += (found.shape[k] - 1) * found.strides[k];
            count *= found.shape[k];
        }
        out_.tensors.push_back({tensor, start, count ? start + (last + 1) * (found.bits / 8) : start});
        return true;
    }

    // Whether autograd would have to know of the call.
    bool has_gradient(PyObject* tensor) {
        if (grad_mode_ == unknown) {
            PyObject* enabled = PyObject_CallNoArgs(torch_.grad_enabled);
            Py_XDECREF(enabled);
            grad_mode_ = enabled == Py_False ? off : on;
        }
        if (grad_mode_ == off) return false;
        PyObject* required = PyObject_GetAttr(tensor, torch_.requires_grad);
        Py_XDECREF(required);
        return required != Py_False;
    }

    const Torch& torch_;
    Signature& out_;
    enum { unknown, on, off } grad_mode_ = unknown;
};

}  // namespace

std::size_t WordsHash::operator()(const std::vector<std::uint64_t>& words) const {
    std::uint64_t hash = words.size();
    for (const std::uint64_t word : words) {
        hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 32;
    }
    return static_cast<std::size_t>(hash);
}

bool read(const Torch& torch, PyObject* const* arguments, Py_ssize_t count, Signature& signature) {
    signature.words.clear();
    signature.tensors.clear();
    signature.numbers.clear();
    signature.device = -1;
    Reader reader(torch, signature);
    bool good = true;
    for (Py_ssize_t k = 0; good && k < count; ++k) good = reader.read(arguments[k]);
    if (good) good = signature.device >= 0 && reader.relate();
    if (PyErr_Occurred()) PyErr_Clear();
    return good;
}

}  // namespace layercache::launch
