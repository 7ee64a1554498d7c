// A C++ function as a Python function: `m.def("name(a, b)", f)`. Python gives the arguments by position or by name.
//
// pybind11's own `def` prints every argument where one does not fit. A printed tensor is read: a large one takes
// seconds, and one without memory ends the interpreter. Here an error names the argument, its type, and nothing else.
#pragma once

#include <algorithm>
#include <array>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings/reader.h"

namespace torchweld {

// What is the same for every bound function: its name, the names of its arguments, its errors.
class Signature {
 public:
  Signature(const std::string& signature, const char* doc)
      : name_(signature.substr(0, signature.find('('))), doc_(signature + "\n--\n\n" + doc) {
    for (size_t begin = signature.find('(') + 1; signature[begin - 1] != ')';) {
      const size_t end = signature.find_first_of(",)", begin);
      if (end > begin) names_.push_back(interned(signature.substr(begin, end - begin).c_str()));
      begin = signature[end] == ',' ? end + 2 : end + 1;
    }
  }

  PyMethodDef* definition() { return &definition_; }

 protected:
  // Checks the number of arguments, and puts those that came by name into `ordered`, where the signature has them.
  PyObject* const* order(PyObject* const* given, size_t positional, PyObject* keywords, PyObject** ordered) const {
    const size_t count = positional + (keywords == nullptr ? 0 : static_cast<size_t>(PyTuple_GET_SIZE(keywords)));
    if (count != names_.size())
      throw py::type_error("[" + name_ + "] expected " + std::to_string(names_.size()) + " arguments, but got " +
                           std::to_string(count));
    if (keywords == nullptr) return given;
    std::copy_n(given, positional, ordered);
    for (size_t i = positional; i < count; ++i) {
      PyObject* keyword = PyTuple_GET_ITEM(keywords, i - positional);
      const size_t at = position(keyword, i);
      if (at == count || ordered[at] != nullptr)
        throw py::type_error("[" + name_ + "] " + py::cast<std::string>(keyword) + ": expected each of " +
                             doc_.substr(0, doc_.find('\n')) + " once, but got " +
                             (at == count ? "another name" : "it twice"));
      ordered[at] = given[i];
    }
    return ordered;
  }

  [[noreturn]] void refuse(const std::string& argument, const std::string& expected, PyObject* got) const {
    throw py::type_error("[" + name_ + "] " + argument + ": expected " + expected + ", but got " +
                         Py_TYPE(got)->tp_name);
  }

  // Makes the exception that is being handled Python's.
  static void restore_exception() {
    try {
      throw;
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
  }

  std::string name_, doc_;
  std::vector<py::str> names_;
  PyMethodDef definition_{};

 private:
  // Callers mostly keep the order of the signature, and Python interns names: the first comparison mostly decides.
  size_t position(PyObject* keyword, size_t likely) const {
    if (names_[likely].ptr() == keyword) return likely;
    for (size_t i = 0; i < names_.size(); ++i)
      if (names_[i].ptr() == keyword || PyUnicode_Compare(names_[i].ptr(), keyword) == 0) return i;
    return names_.size();
  }
};

template <class Return, class... Args>
class Function : public Signature {
 public:
  Function(const char* signature, Return (*function)(Args...), const char* doc)
      : Signature(signature, doc), function_(function) {
    if (names_.size() != sizeof...(Args)) throw std::logic_error("a signature that does not fit: " + doc_);
    definition_ = {name_.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Function::call)),
                   METH_FASTCALL | METH_KEYWORDS, doc_.c_str()};
  }

 private:
  static PyObject* call(PyObject* self, PyObject* const* given, Py_ssize_t positional, PyObject* keywords) {
    const auto& function = *static_cast<const Function*>(PyCapsule_GetPointer(self, nullptr));
    try {
      std::array<PyObject*, sizeof...(Args) + 1> ordered{};
      return function.run(function.order(given, static_cast<size_t>(positional), keywords, ordered.data()),
                          std::index_sequence_for<Args...>{});
    } catch (...) {
      restore_exception();
    }
    return nullptr;
  }

  template <size_t... I>
  PyObject* run([[maybe_unused]] PyObject* const* given, std::index_sequence<I...>) const {
    [[maybe_unused]] std::tuple<Reader<std::decay_t<Args>>...> readers;
    (load<std::decay_t<Args>>(std::get<I>(readers), given[I], I), ...);
    if constexpr (std::is_void_v<Return>) {
      function_(std::get<I>(readers).get()...);
      Py_RETURN_NONE;
    } else if constexpr (std::is_same_v<Return, py::object>) {
      return function_(std::get<I>(readers).get()...).release().ptr();
    } else {
      return py::cast(function_(std::get<I>(readers).get()...)).release().ptr();
    }
  }

  template <class T, class R>
  void load(R& reader, PyObject* source, size_t i) const {
    if (!reader.load(source)) refuse(names_[i], R::expected(), source);
    if constexpr (kIsRecord<T>)
      reader.each([&](auto& field, PyObject* item, const char* name) {
        if (!field.load(item)) refuse(name, field.expected(), item);
      });
  }

  Return (*function_)(Args...);
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
