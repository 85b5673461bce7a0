// Calls of one op that were made before, and can be made again without Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "driver.hpp"
#include "signature.hpp"

namespace layercache::launch {

// One parameter of a kernel: where its value comes from.
struct Parameter {
    enum Source : std::uint8_t { argument, made, number, constant, unknown };
    Source source;
    std::uint32_t index;  // of the tensor or the number
    std::int64_t value;   // bytes behind the tensor's start, or the constant
};

struct Launch {
    void* function;
    unsigned grid[3], threads, shared_bytes;
    std::vector<Parameter> parameters;
};

// What a call returns: nothing, one of its own or its new tensors, or a list or tuple of such.
struct Result {
    enum Kind : std::uint8_t { nothing, argument, made, list, tuple };
    Kind kind = nothing;
    std::size_t index = 0;
    std::vector<Result> items;
};

struct Plan {
    std::vector<Launch> launches;
    std::vector<pybind11::tuple> made;  // arguments of torch.empty: shape, and dtype and device by name
    Result result;
    pybind11::object kept;  // what the functions live in
};

class Calls {
  public:
    // Raises where the driver cannot be used, or the torch of this process has no quick look at tensors.
    Calls(const pybind11::object& torch, const std::string& library, int device_type);

    // What the arguments have in common with others, to pass to `keep`; null where they cannot be repeated, or calls
    // like theirs have been kept.
    std::unique_ptr<Signature> look(const pybind11::args& arguments) const;

    // Keeps a call. `launches` is (function, grid, threads, shared bytes, arguments, hidden) of each; `made` is
    // (tensor, shape, keywords) of each new tensor. Where the arguments of a launch do not follow from those of the
    // call, or `faithful` says that launches and new tensors are not all there was, it is only remembered not to look
    // at such calls again.
    void keep(const Signature& signature, const pybind11::list& launches, const pybind11::list& made,
              const pybind11::object& result, const pybind11::object& kept, bool faithful);

    // Makes the call again: its result, a new reference; or null, and then without an error nothing was done.
    PyObject* repeat(PyObject* const* arguments, Py_ssize_t count) const;

    // The stream that launches are put on now; raises what torch raises.
    void* stream(int device) const;

    // How many are kept.
    std::size_t size() const;

  private:
    std::shared_ptr<Plan> plan(const Signature& signature, const pybind11::list& launches, const pybind11::list& made,
                               const pybind11::object& result, const pybind11::object& kept) const;
    // The result, or null: with an error where memory is short or the driver refuses a later launch, without where it
    // refuses the first.
    PyObject* run(const Plan& plan, const Signature& signature, void* stream) const;
    bool launch(const Launch& launch, const Signature& signature, const std::vector<char*>& made, void* stream) const;

    Torch torch_;
    Driver driver_;
    // null for calls that cannot be repeated; shared, because a launch waits without the lock of the interpreter
    std::unordered_map<std::vector<std::uint64_t>, std::shared_ptr<const Plan>, WordsHash> plans_;
};

}  // namespace layercache::launch
