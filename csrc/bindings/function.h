// A C++ function as a Python function: `m.def("name(a, b)", f)`. Python gives the arguments by position or by name.
//
// pybind11's own `def` prints every argument where one does not fit. A printed tensor is read: a large one takes
// seconds, and one without memory ends the interpreter. Here an error names the argument, its type, and nothing else.
#pragma once

#include <array>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "bindings/reader.h"

namespace torchweld {

template <class Return, class... Args>
class Function {
 public:
  Function(const std::string& signature, Return (*function)(Args...), const char* doc)
      : name_(signature.substr(0, signature.find('('))), doc_(signature + "\n--\n\n" + doc), function_(function) {
    size_t begin = signature.find('(') + 1;
    for (py::str& name : names_) {
      const size_t end = signature.find_first_of(",)", begin);
      PyObject* text = PyUnicode_InternFromString(signature.substr(begin, end - begin).c_str());
      if (text == nullptr) throw py::error_already_set();
      name = py::reinterpret_steal<py::str>(text);
      begin = end + 2;
    }
    definition_ = {name_.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Function::call)),
                   METH_FASTCALL | METH_KEYWORDS, doc_.c_str()};
  }

  PyMethodDef* definition() { return &definition_; }

 private:
  static constexpr size_t kCount = sizeof...(Args);

  static PyObject* call(PyObject* self, PyObject* const* given, Py_ssize_t positional, PyObject* keywords) {
    const auto& function = *static_cast<const Function*>(PyCapsule_GetPointer(self, nullptr));
    try {
      const Py_ssize_t count = positional + (keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords));
      if (count != static_cast<Py_ssize_t>(kCount))
        throw py::type_error("[" + function.name_ + "] expected " + std::to_string(kCount) + " arguments, but got " +
                             std::to_string(count));
      if (keywords == nullptr) return function.run(given, std::index_sequence_for<Args...>{});
      std::array<PyObject*, kCount + 1> ordered{};
      function.order(given, static_cast<size_t>(positional), keywords, ordered.data());
      return function.run(ordered.data(), std::index_sequence_for<Args...>{});
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

  // Puts arguments that came by name where the signature has them. There are as many as the signature has.
  void order(PyObject* const* given, size_t positional, PyObject* keywords, PyObject** ordered) const {
    for (size_t i = 0; i < positional; ++i) ordered[i] = given[i];
    for (size_t i = positional; i < kCount; ++i) {
      PyObject* keyword = PyTuple_GET_ITEM(keywords, i - positional);
      const size_t at = position(keyword, i);
      if (at == kCount || ordered[at] != nullptr)
        throw py::type_error("[" + name_ + "] " + py::cast<std::string>(keyword) + ": expected each of " +
                             doc_.substr(0, doc_.find('\n')) + " once, but got " +
                             (at == kCount ? "another name" : "it twice"));
      ordered[at] = given[i];
    }
  }

  // Callers mostly keep the order of the signature, and Python interns names: the first comparison mostly decides.
  size_t position(PyObject* keyword, size_t likely) const {
    if (names_[likely].ptr() == keyword) return likely;
    for (size_t i = 0; i < kCount; ++i)
      if (names_[i].ptr() == keyword || PyUnicode_Compare(names_[i].ptr(), keyword) == 0) return i;
    return kCount;
  }

  template <size_t... I>
  PyObject* run([[maybe_unused]] PyObject* const* given, std::index_sequence<I...>) const {
    [[maybe_unused]] std::tuple<Reader<std::decay_t<Args>>...> readers;
    (load<std::decay_t<Args>>(std::get<I>(readers), given[I], names_[I]), ...);
    if constexpr (std::is_void_v<Return>) {
      function_(std::get<I>(readers).get()...);
      Py_RETURN_NONE;
    } else if constexpr (std::is_same_v<Return, py::object>) {
      return function_(std::get<I>(readers).get()...).release().ptr();
    } else {
      return py::cast(function_(std::get<I>(readers).get()...)).release().ptr();
    }
  }

  template <class T, class R, class Name>
  void load(R& reader, PyObject* source, const Name& name) const {
    if (!reader.load(source))
      throw py::type_error("[" + name_ + "] " + std::string(py::str(name)) + ": expected " + R::expected() +
                           ", but got " + Py_TYPE(source)->tp_name);
    if constexpr (kIsRecord<T>)
      reader.each([&](auto& field, PyObject* item, const char* field_name) { load<void>(field, item, field_name); });
  }

  std::string name_, doc_;
  std::array<py::str, kCount> names_;
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

  // Of a lambda without captures.
  template <class F>
  void def(const char* signature, F function, const char* doc = "") {
    def(signature, +function, doc);
  }

  // Publishes the names of a record's fields.
  template <class Record>
  void def_record(const char* name) {
    attr(name) = std::apply([](const auto&... field) { return py::make_tuple(field.name...); }, Record::fields());
  }
};

}  // namespace torchweld
