// A call of an op as Python hands it over: one dict, looked up by name. The names are those of the
// op's public function (kbfgs_ext/ops/<family>/api.py) and stand in no other list.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace kbfgs {

using at::Tensor;
using Tensors = std::vector<Tensor>;

class Call {
 public:
  // Everything is converted at once, so that the GIL is not needed afterwards. Keys are not copied:
  // the dict must outlive this.
  explicit Call(const pybind11::dict& arguments) {
    arguments_.reserve(arguments.size());
    for (const auto& [key, value] : arguments) {
      Py_ssize_t length = 0;
      const char* name = PyUnicode_AsUTF8AndSize(key.ptr(), &length);
      if (name == nullptr) throw pybind11::error_already_set();
      const std::string_view view(name, static_cast<size_t>(length));
      arguments_.emplace_back(view, converted(view, value.ptr()));
    }
  }

  const Tensors& tensors(std::string_view name) const {
    return get<Tensors>(name, "a list of tensors");
  }
  const Tensor& tensor(std::string_view name) const { return get<Tensor>(name, "a tensor"); }
  int64_t integer(std::string_view name) const { return get<int64_t>(name, "an integer"); }
  const std::string& text(std::string_view name) const { return get<std::string>(name, "a string"); }
  double number(std::string_view name) const {
    const int64_t* whole = std::get_if<int64_t>(&find(name));
    return whole ? static_cast<double>(*whole) : get<double>(name, "a number");
  }
  // Whether it is not None.
  bool has(std::string_view name) const {
    return !std::holds_alternative<std::monostate>(find(name));
  }

 private:
  using Value = std::variant<std::monostate, Tensors, Tensor, double, int64_t, std::string>;

  static Value converted(std::string_view name, PyObject* value) {
    if (value == Py_None) return {};
    if (THPVariable_Check(value)) return THPVariable_Unpack(value);
    if (PyFloat_Check(value)) return PyFloat_AS_DOUBLE(value);
    if (PyLong_Check(value)) return pybind11::handle(value).cast<int64_t>();
    if (PyUnicode_Check(value)) return pybind11::handle(value).cast<std::string>();
    if (!PyList_Check(value) && !PyTuple_Check(value))
      throw std::invalid_argument(std::string(name) + " is of a type that no op takes");
    Tensors list;
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(value);
    list.reserve(static_cast<size_t>(size));
    for (Py_ssize_t i = 0; i < size; ++i) {
      PyObject* entry = PySequence_Fast_GET_ITEM(value, i);
      if (!THPVariable_Check(entry))
        throw std::invalid_argument(std::string(name) + " must be a list of tensors");
      list.push_back(THPVariable_Unpack(entry));
    }
    return list;
  }

  // A call has some twenty arguments: comparing them in turn is faster than a hash.
  const Value& find(std::string_view name) const {
    for (const auto& [known, value] : arguments_)
      if (known == name) return value;
    throw std::invalid_argument("the call has no argument " + std::string(name));
  }

  template <typename Wanted>
  const Wanted& get(std::string_view name, const char* kind) const {
    const Wanted* found = std::get_if<Wanted>(&find(name));
    if (found == nullptr) throw std::invalid_argument(std::string(name) + " must be " + kind);
    return *found;
  }

  std::vector<std::pair<std::string_view, Value>> arguments_;
};

// `function` of the module takes the dict, and runs without the GIL.
inline void def(pybind11::module_& module, const char* function, void (*run)(const Call&)) {
  module.def(function, [run](const pybind11::dict& arguments) {
    const Call call(arguments);
    const pybind11::gil_scoped_release release;
    run(call);
  });
}

}  // namespace kbfgs
