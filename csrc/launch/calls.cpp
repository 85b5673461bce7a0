#include "calls.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace py = pybind11;

namespace layercache::launch {

namespace {

// A program that never calls alike is not to fill the memory.
constexpr std::size_t MOST_PLANS = 4096;
constexpr std::size_t MOST_PARAMETERS = 256;

// Set while it lives.
class Flag {
  public:
    explicit Flag(bool& flag) : flag_(flag) { flag_ = true; }
    ~Flag() { flag_ = false; }

  private:
    bool& flag_;
};

// Keeps the tensors of a call, whose lists another thread may change while this one waits.
class Held {
  public:
    explicit Held(const Signature& signature) : tensors_(signature.tensors) {
        for (const Seen& seen : tensors_) Py_INCREF(seen.object);
    }
    ~Held() {
        for (const Seen& seen : tensors_) Py_DECREF(seen.object);
    }

  private:
    const std::vector<Seen>& tensors_;
};

struct New {
    PyObject* object;
    char *start, *end;
};

char* start_of(const Torch& torch, PyObject* tensor) {
    dlpack::Tensor found;
    if (torch.exchange->borrow(tensor, &found) != 0) throw py::error_already_set();
    return found.start();
}

// The tensor whose memory an address is in; the number of tensors if there is none.
template <class Tensors>
std::size_t find(const Tensors& tensors, const char* address) {
    for (std::size_t k = 0; k < tensors.size(); ++k)
        if (tensors[k].start <= address && address < tensors[k].end) return k;
    return tensors.size();
}

Parameter parameter(const Torch& torch, const py::handle& value, const Signature& signature,
                    const std::vector<New>& made, std::vector<float>& numbers) {
    if (PyFloat_Check(value.ptr())) {
        const auto index = static_cast<std::uint32_t>(numbers.size());
        numbers.push_back(static_cast<float>(PyFloat_AS_DOUBLE(value.ptr())));
        std::int32_t bits;
        std::memcpy(&bits, &numbers.back(), sizeof bits);
        return {Parameter::number, index, bits};
    }
    if (PyLong_Check(value.ptr())) return {Parameter::constant, 0, value.cast<std::int64_t>()};
    char* start = start_of(torch, value.ptr());
    if (const std::size_t k = find(made, start); k < made.size())
        return {Parameter::made, static_cast<std::uint32_t>(k), start - made[k].start};
    if (const std::size_t k = find(signature.tensors, start); k < signature.tensors.size())
        return {Parameter::argument, static_cast<std::uint32_t>(k), start - signature.tensors[k].start};
    return {Parameter::unknown, 0, 0};
}

bool describe(const py::handle& value, const Signature& signature, const std::vector<New>& made, Result& result) {
    if (value.is_none()) return true;
    if (py::isinstance<py::list>(value) || py::isinstance<py::tuple>(value)) {
        result.kind = py::isinstance<py::list>(value) ? Result::list : Result::tuple;
        for (const auto& item : py::reinterpret_borrow<py::sequence>(value)) {
            result.items.emplace_back();
            if (!describe(item, signature, made, result.items.back())) return false;
        }
        return true;
    }
    for (result.kind = Result::made, result.index = 0; result.index < made.size(); ++result.index)
        if (made[result.index].object == value.ptr()) return true;
    result.kind = Result::argument;
    for (result.index = 0; result.index < signature.tensors.size(); ++result.index)
        if (signature.tensors[result.index].object == value.ptr()) return true;
    return false;
}

// Whether something wants to see every operation.
bool is_watched(const Torch& torch) {
    PyObject* modes = PyObject_CallNoArgs(torch.dispatch_modes);
    const bool watched = !modes || PyLong_AsLong(modes) != 0;
    Py_XDECREF(modes);
    PyErr_Clear();
    return watched;
}

PyObject* build(const Result& result, const Signature& signature, const std::vector<py::object>& made) {
    switch (result.kind) {
        case Result::nothing: return Py_NewRef(Py_None);
        case Result::argument: return Py_NewRef(signature.tensors[result.index].object);
        case Result::made: return Py_NewRef(made[result.index].ptr());
        default: break;
    }
    const bool list = result.kind == Result::list;
    const auto size = static_cast<Py_ssize_t>(result.items.size());
    PyObject* items = list ? PyList_New(size) : PyTuple_New(size);
    for (Py_ssize_t k = 0; items && k < size; ++k) {
        PyObject* item = build(result.items[static_cast<std::size_t>(k)], signature, made);
        if (list)
            PyList_SET_ITEM(items, k, item);
        else
            PyTuple_SET_ITEM(items, k, item);
    }
    return items;
}

}  // namespace

Calls::Calls(const py::object& torch, const std::string& library, int device_type) : driver_(Driver::open(library)) {
    // classes and functions of torch live as long as the process
    const auto hold = [](const py::object& found) { return py::object(found).release().ptr(); };
    torch_.tensor = hold(torch.attr("Tensor"));
    torch_.parameter = hold(torch.attr("nn").attr("Parameter"));
    torch_.grad_enabled = hold(torch.attr("is_grad_enabled"));
    torch_.dispatch_modes = hold(torch.attr("_C").attr("_len_torch_dispatch_stack"));
    torch_.empty = hold(torch.attr("empty"));
    torch_.requires_grad = PyUnicode_InternFromString("requires_grad");
    torch_.device_type = device_type;
    torch_.exchange = dlpack::exchange_of(torch_.tensor);
    if (!torch_.exchange || !torch_.exchange->borrow || !torch_.exchange->current_stream)
        throw std::runtime_error("this version of torch has no exchange API of DLPack");
}

std::unique_ptr<Signature> Calls::look(const py::args& arguments) const {
    auto signature = std::make_unique<Signature>();
    PyObject** items = PySequence_Fast_ITEMS(arguments.ptr());
    if (!read(torch_, items, static_cast<Py_ssize_t>(arguments.size()), *signature)) return nullptr;
    return plans_.count(signature->words) ? nullptr : std::move(signature);
}

void Calls::keep(const Signature& signature, const py::list& launches, const py::list& made, const py::object& result,
                 const py::object& kept, bool faithful) {
    std::shared_ptr<Plan> plan;
    try {
        if (faithful) plan = this->plan(signature, launches, made, result, kept);
    } catch (const std::exception&) {  // the call itself is done
        PyErr_Clear();
    }
    if (plans_.size() >= MOST_PLANS) plans_.clear();
    plans_[signature.words] = std::move(plan);
}

std::shared_ptr<Plan> Calls::plan(const Signature& signature, const py::list& launches, const py::list& made,
                                  const py::object& result, const py::object& kept) const {
    auto plan = std::make_shared<Plan>();
    plan->kept = kept;
    std::vector<New> tensors;
    for (const auto& item : made) {
        const auto entry = item.cast<py::tuple>();
        const py::object tensor = entry[0];
        char* start = start_of(torch_, tensor.ptr());
        tensors.push_back({tensor.ptr(), start, start + tensor.attr("nbytes").cast<std::int64_t>()});
        plan->made.push_back(py::make_tuple(entry[1], entry[2]));
    }
    bool uses_numbers = signature.numbers.empty();
    for (const auto& item : launches) {
        const auto entry = item.cast<py::tuple>();
        Launch launch{reinterpret_cast<void*>(entry[0].cast<std::uintptr_t>()), {}, entry[2].cast<unsigned>(),
                      entry[3].cast<unsigned>(), {}};
        for (int k = 0; k < 3; ++k) launch.grid[k] = entry[1].cast<py::tuple>()[k].cast<unsigned>();
        std::vector<float> numbers;
        for (const auto& value : entry[4].cast<py::tuple>()) {
            launch.parameters.push_back(parameter(torch_, value, signature, tensors, numbers));
            if (launch.parameters.back().source == Parameter::unknown) return nullptr;
        }
        // numbers of a launch are those of the call, or, in a call without any, its kernel's own
        if (!numbers.empty() && !signature.numbers.empty() && numbers != signature.numbers) return nullptr;
        uses_numbers |= !numbers.empty();
        if (signature.numbers.empty())
            for (Parameter& p : launch.parameters)
                if (p.source == Parameter::number) p.source = Parameter::constant;
        launch.parameters.resize(launch.parameters.size() + entry[5].cast<std::size_t>(), {Parameter::constant, 0, 0});
        if (launch.parameters.size() > MOST_PARAMETERS) return nullptr;
        plan->launches.push_back(std::move(launch));
    }
    const bool known = uses_numbers && describe(result, signature, tensors, plan->result);
    return known ? plan : nullptr;
}

std::size_t Calls::size() const {
    return static_cast<std::size_t>(
        std::count_if(plans_.begin(), plans_.end(), [](const auto& entry) { return entry.second != nullptr; }));
}

void* Calls::stream(int device) const {
    void* stream = nullptr;
    if (torch_.exchange->current_stream(torch_.device_type, device, &stream) != 0) throw py::error_already_set();
    return stream;
}

bool Calls::launch(const Launch& launch, const Signature& signature, const std::vector<char*>& made,
                   void* stream) const {
    std::uint64_t values[MOST_PARAMETERS];
    void* addresses[MOST_PARAMETERS];
    std::size_t count = 0;
    for (const Parameter& p : launch.parameters) {
        // little-endian, so that a parameter of four bytes is the lower half
        std::uint64_t value = static_cast<std::uint64_t>(p.value);
        if (p.source == Parameter::argument)
            value = reinterpret_cast<std::uint64_t>(signature.tensors[p.index].start + p.value);
        else if (p.source == Parameter::made)
            value = reinterpret_cast<std::uint64_t>(made[p.index] + p.value);
        else if (p.source == Parameter::number)
            std::memcpy(&value, &signature.numbers[p.index], sizeof(float));
        values[count] = value;
        addresses[count] = &values[count];
        ++count;
    }
    return driver_.launch(launch.function, launch.grid[0], launch.grid[1], launch.grid[2], launch.threads, 1, 1,
                          launch.shared_bytes, stream, addresses, nullptr) == 0;
}

PyObject* Calls::repeat(PyObject* const* arguments, Py_ssize_t count) const {
    // kept from call to call for its memory; a call from within (of the garbage collector, say) goes the long way
    thread_local Signature signature;
    thread_local bool busy = false;
    if (plans_.empty() || busy) return nullptr;
    const Flag flag(busy);
    if (!read(torch_, arguments, count, signature)) return nullptr;
    const auto found = plans_.find(signature.words);
    const std::shared_ptr<const Plan> plan = found == plans_.end() ? nullptr : found->second;
    if (!plan || !driver_.is_current(signature.device) || is_watched(torch_)) return nullptr;
    void* stream = nullptr;
    if (torch_.exchange->current_stream(torch_.device_type, signature.device, &stream) != 0)
        return PyErr_Clear(), nullptr;
    const Held held(signature);
    return run(*plan, signature, stream);
}

PyObject* Calls::run(const Plan& plan, const Signature& signature, void* stream) const {
    std::vector<py::object> made;
    std::vector<char*> starts;
    for (const py::tuple& entry : plan.made) {
        PyObject *shape = PyTuple_GET_ITEM(entry.ptr(), 0), *options = PyTuple_GET_ITEM(entry.ptr(), 1);
        PyObject* tensor = PyObject_Call(torch_.empty, shape, options);
        dlpack::Tensor fields;
        if (tensor) made.push_back(py::reinterpret_steal<py::object>(tensor));
        if (!tensor || torch_.exchange->borrow(tensor, &fields) != 0) return nullptr;  // out of memory
        starts.push_back(fields.start());
    }
    auto result = py::reinterpret_steal<py::object>(build(plan.result, signature, made));
    if (!result) return nullptr;
    std::size_t done = 0;
    Py_BEGIN_ALLOW_THREADS  // a full queue makes the driver wait
    while (done < plan.launches.size() && launch(plan.launches[done], signature, starts, stream)) ++done;
    Py_END_ALLOW_THREADS
    if (done == plan.launches.size()) return result.release().ptr();
    // what is written in place cannot be computed again from the start
    if (done) PyErr_SetString(PyExc_RuntimeError, "the CUDA driver refused a kernel of a call that had begun");
    return nullptr;
}

}  // namespace layercache::launch
