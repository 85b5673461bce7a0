// What a call's arguments have in common with those of another call that launches the same.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "dlpack.hpp"

namespace layercache::launch {

// A tensor among the arguments.
struct Seen {
    PyObject* object;  // borrowed
    char *start, *end;  // of its memory; equal where it is empty
};

// Arguments, taken apart. Two calls with equal `words` differ in nothing but addresses and `numbers`: the words hold
// the nesting, every dtype, shape, stride and alignment, integers and flags, and how tensors that share memory lie to
// each other.
struct Signature {
    std::vector<std::uint64_t> words;
    std::vector<Seen> tensors;
    std::vector<float> numbers;  // every float, in order
    std::int32_t device = -1;
};

struct WordsHash {
    std::size_t operator()(const std::vector<std::uint64_t>& words) const;
};

// What PyTorch brings for looking at its tensors.
struct Torch {
    const dlpack::Exchange* exchange = nullptr;
    PyObject *tensor = nullptr, *parameter = nullptr;  // the classes; no other is looked into
    PyObject *grad_enabled = nullptr, *dispatch_modes = nullptr, *empty = nullptr;  // functions
    PyObject *requires_grad = nullptr;  // the name
    std::int32_t device_type = dlpack::CUDA;
};

// Takes arguments apart; false, and no error is set, where there is anything that a repeated call could not stand in
// for: a tensor elsewhere than on the one device, of another class or with a gradient, a number that is not finite.
bool read(const Torch& torch, PyObject* const* arguments, Py_ssize_t count, Signature& signature);

}  // namespace layercache::launch
