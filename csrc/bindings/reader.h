// What a bound function reads from one Python argument: a number, a string, a record, or None. tensor.h reads tensors.
//
// An argument is converted in two steps, because a conversion may run Python code that changes a tensor: `load`
// converts numbers and looks at types, `get` then reads the tensors.
#pragma once

#include <pybind11/stl.h>

#include <cstddef>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "bindings/torch_api.h"

namespace torchweld {

inline py::object checked(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline py::str interned(const char* text) {
  return py::reinterpret_steal<py::str>(checked(PyUnicode_InternFromString(text)).release());
}

template <class T, class = void>
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

// A field of a record: the name that Python has for it, and the member that it fills.
template <class Record, class T>
struct Field {
  using Type = T;
  const char* name;
  T Record::* member;
};
template <class Record, class T>
Field(const char*, T Record::*) -> Field<Record, T>;

// A record is a struct with a static function `fields`, which returns a tuple of Field. Python has a NamedTuple of the
// same name with the same fields in the same order. A test compares the two.
template <class T>
using FieldsOf = decltype(T::fields());
template <class T>
constexpr size_t kFieldCount = std::tuple_size_v<FieldsOf<T>>;

inline std::string tuple_of(std::initializer_list<const char*> names) {
  std::string text;
  for (const char* name : names) text += (text.empty() ? "a tuple (" : ", ") + std::string(name);
  return text + ")";
}

// Python gives a record as a tuple. A tuple keeps its elements for as long as it lives. Another sequence may make them
// when it is read.
template <class Record>
struct Reader<Record, std::void_t<FieldsOf<Record>>> {
  static std::string expected() {
    return std::apply([](const auto&... field) { return tuple_of({field.name...}); }, Record::fields());
  }

  // The fields are loaded by `visit`, so that an error names the field.
  bool load(PyObject* tuple) {
    source = tuple;
    return PyTuple_Check(source) && PyTuple_GET_SIZE(source) == static_cast<Py_ssize_t>(kFieldCount<Record>);
  }

  // Calls visit(reader, Python object, name) for each field.
  template <class Visit>
  void each(Visit visit) {
    each(visit, std::make_index_sequence<kFieldCount<Record>>{});
  }

  Record get() {
    return std::apply(
        [&](const auto&... field) {
          return std::apply(
              [&](auto&... reader) {
                Record record{};
                ((record.*field.member = reader.get()), ...);
                return record;
              },
              readers);
        },
        Record::fields());
  }

 private:
  template <class Visit, size_t... I>
  void each(Visit& visit, std::index_sequence<I...>) {
    const auto fields = Record::fields();
    (visit(std::get<I>(readers), PyTuple_GET_ITEM(source, I), std::get<I>(fields).name), ...);
  }

  template <class... F>
  static std::tuple<Reader<typename F::Type>...> readers_of(const std::tuple<F...>&);

  decltype(readers_of(Record::fields())) readers;
  PyObject* source = nullptr;
};

template <class T, class = void>
constexpr bool kIsRecord = false;
template <class T>
constexpr bool kIsRecord<T, std::void_t<FieldsOf<T>>> = true;

// The value of an attribute that torchweld itself has set.
template <class T>
T read(PyObject* source) {
  Reader<T> reader;
  bool fits = reader.load(source);
  if constexpr (kIsRecord<T>)
    if (fits) reader.each([&](auto& field, PyObject* item, const char*) { fits = fits && field.load(item); });
  if (!fits) throw py::type_error("expected " + Reader<T>::expected() + ", but got " + Py_TYPE(source)->tp_name);
  return reader.get();
}

}  // namespace torchweld
