// A C++ function as a Python function of positional arguments: `m.def("name(a, b)", f)`.
//
// pybind11's own `def` prints every argument where one does not fit. A printed tensor is read: a large one takes
// seconds, and one without memory ends the interpreter. Here an error names the argument, its type, and nothing else.
// Arguments are converted in two steps, because a conversion may run Python code that changes a tensor: `load` converts
// numbers and looks at types, `get` then reads the tensors.
#pragma once

#include <pybind11/stl.h>

#include <iterator>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "bindings/torch_api.h"

namespace torchweld {

// What is read from one argument; tensor.h has those of tensors.
template <class T>
struct Reader {
  static_assert(std::is_arithmetic_v<T> || std::is_same_v<T, std::string>);

  static std::string expected() {
    if (std::is_same_v<T, std::string>) return "a string";
    if (std::is_same_v<T, bool>) return "a bool";
    return std::is_integral_v<T> ? "an integer of 64 bits" : "a number";
  }

  bool load(PyObject* source) { return !is_freed(source) && caster.load(source, true); }
  T get() { return py::detail::cast_op<T>(caster); }

  py::detail::make_caster<T> caster;

 private:
  // torch reads a tensor that stands for a number without asking whether it has memory.
  static bool is_freed(PyObject* source) {
    const auto& api = TorchApi::get();
    return api.is_tensor(source) && api.is_readable(source) && !api.view(source).has_memory();
  }
};

template <class T>
struct Reader<std::optional<T>> {
  static std::string expected() { return Reader<T>::expected() + " or None"; }

  bool load(PyObject* source) {
    given = source != Py_None;
    return !given || reader.load(source);
  }
  std::optional<T> get() { return given ? std::optional<T>(reader.get()) : std::nullopt; }

  Reader<T> reader;
  bool given = false;
};

// Only a tuple: its elements live as long as it does, those of another sequence may be made as it is read.
template <class... Ts>
struct Reader<std::tuple<Ts...>> {
  static std::string expected() {
    std::string text;
    ((text += (text.empty() ? "a tuple (" : ", ") + Reader<Ts>::expected()), ...);
    return text + ")";
  }

  bool load(PyObject* source) {
    return PyTuple_Check(source) && PyTuple_GET_SIZE(source) == sizeof...(Ts) &&
           load(source, std::index_sequence_for<Ts...>{});
  }
  std::tuple<Ts...> get() {
    return std::apply([](auto&... reader) { return std::tuple<Ts...>{reader.get()...}; }, readers);
  }

 private:
  template <size_t... I>
  bool load(PyObject* source, std::index_sequence<I...>) {
    return (std::get<I>(readers).load(PyTuple_GET_ITEM(source, I)) && ...);
  }

  std::tuple<Reader<Ts>...> readers;
};

// A record whose fields Python gives as a tuple in the order of Record::kFields.
template <class Record>
struct RecordReader : Reader<typename Record::Tuple> {
  static_assert(std::size(Record::kFields) == std::tuple_size_v<typename Record::Tuple>);

  Record get() {
    return std::apply([](auto... field) { return Record{std::move(field)...}; }, Reader<typename Record::Tuple>::get());
  }
};

template <class Return, class... Args>
class Function {
 public:
  Function(const std::string& signature, Return (*function)(Args...), const char* doc)
      : name_(signature.substr(0, signature.find('('))), doc_(signature + "\n--\n\n" + doc), function_(function) {
    definition_ = {name_.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Function::call)),
                   METH_FASTCALL, doc_.c_str()};
  }

  PyMethodDef* definition() { return &definition_; }

 private:
  static constexpr size_t kCount = sizeof...(Args);

  static PyObject* call(PyObject* self, PyObject* const* given, Py_ssize_t count) {
    const auto& function = *static_cast<const Function*>(PyCapsule_GetPointer(self, nullptr));
    try {
      if (count != static_cast<Py_ssize_t>(kCount))
        throw py::type_error("[" + function.name_ + "] expected " + std::to_string(kCount) + " arguments, but got " +
                             std::to_string(count));
      return function.run(given, std::index_sequence_for<Args...>{});
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (const py::builtin_exception& error) {
      error.set_error();
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  template <size_t... I>
  PyObject* run([[maybe_unused]] PyObject* const* given, std::index_sequence<I...>) const {
    [[maybe_unused]] std::tuple<Reader<std::decay_t<Args>>...> readers;
    (load(std::get<I>(readers), given[I], I), ...);
    if constexpr (std::is_void_v<Return>) {
      function_(std::get<I>(readers).get()...);
      Py_RETURN_NONE;
    } else {
      return py::cast(function_(std::get<I>(readers).get()...)).release().ptr();
    }
  }

  template <class R>
  void load(R& reader, PyObject* source, size_t index) const {
    if (!reader.load(source))
      throw py::type_error("[" + name_ + "] " + argument(index) + ": expected " + R::expected() + ", but got " +
                           Py_TYPE(source)->tp_name);
  }

  // The name of an argument, from the signature "name(a, b)".
  std::string argument(size_t index) const {
    size_t begin = doc_.find('(') + 1;
    for (; index > 0; --index) begin = doc_.find(", ", begin) + 2;
    return doc_.substr(begin, doc_.find_first_of(",)", begin) - begin);
  }

  std::string name_, doc_;
  Return (*function_)(Args...);
  PyMethodDef definition_;
};

struct Module : py::module_ {
  explicit Module(py::module_ module) : py::module_(std::move(module)) {}

  template <class Return, class... Args>
  void def(const char* signature, Return (*function)(Args...), const char* doc = "") {
    auto* bound = new Function<Return, Args...>(signature, function, doc);  // lives as long as the process
    PyMethodDef* definition = bound->definition();
    add_object(definition->ml_name, py::reinterpret_steal<py::object>(PyCFunction_NewEx(
                                        definition, py::capsule(bound).ptr(), attr("__name__").ptr())));
  }

  // Publishes the names of a record's fields.
  template <class Record>
  void def_record(const char* name) {
    py::tuple fields(std::size(Record::kFields));
    for (size_t i = 0; i < std::size(Record::kFields); ++i) fields[i] = Record::kFields[i];
    attr(name) = fields;
  }

  // Of a lambda without captures.
  template <class F>
  void def(const char* signature, F function, const char* doc = "") {
    def(signature, +function, doc);
  }
};

}  // namespace torchweld
