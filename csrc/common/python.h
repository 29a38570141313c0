// The one place that knows Python: a dict becomes a Call, functions of a Call enter a module. These
// headers take longer to compile than all the rest, so the families' bindings do without them.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../bindings.h"
#include "arguments.h"

namespace kbfgs {

inline void translate_unsupported() {
  pybind11::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const Unsupported& reason) {
      const auto registry = pybind11::module_::import("kbfgs_ext.ops.registry");
      PyErr_SetString(registry.attr("Unsupported").ptr(), reason.what());
    }
  });
}

inline Call::Value converted(std::string_view name, PyObject* value) {
  if (value == Py_None) return {};
  if (THPVariable_Check(value)) return THPVariable_Unpack(value);
  if (PyFloat_Check(value)) return PyFloat_AS_DOUBLE(value);
  if (PyLong_Check(value)) return pybind11::handle(value).cast<int64_t>();
  if (PyUnicode_Check(value)) return pybind11::handle(value).cast<std::string>();
  if (!PyList_Check(value) && !PyTuple_Check(value))
    throw std::invalid_argument(std::string(name) + " is of a type that no op takes");
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(value);
  if (size > 0 && PyFloat_Check(PySequence_Fast_GET_ITEM(value, 0))) {
    Call::Numbers numbers;
    for (Py_ssize_t i = 0; i < size; ++i)
      numbers.push_back(pybind11::handle(PySequence_Fast_GET_ITEM(value, i)).cast<double>());
    return numbers;
  }
  Tensors list;
  list.reserve(static_cast<size_t>(size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* entry = PySequence_Fast_GET_ITEM(value, i);
    if (!THPVariable_Check(entry))
      throw std::invalid_argument(std::string(name) + " must be a list of tensors");
    list.push_back(THPVariable_Unpack(entry));
  }
  return list;
}

// All at once, so that the GIL is not needed afterwards.
inline Call converted(const pybind11::dict& arguments) {
  std::vector<Call::Named> out;
  out.reserve(arguments.size());
  for (const auto& [key, value] : arguments) {
    Py_ssize_t length = 0;
    const char* data = PyUnicode_AsUTF8AndSize(key.ptr(), &length);
    if (data == nullptr) throw pybind11::error_already_set();
    const std::string_view name(data, static_cast<size_t>(length));
    out.emplace_back(name, converted(name, value.ptr()));
  }
  return Call(std::move(out));
}

inline void define(pybind11::module_& module, const Functions& functions) {
  for (const auto& [name, run] : functions)
    module.def(name, [run = run](const pybind11::dict& arguments) {
      const Call call = converted(arguments);
      const pybind11::gil_scoped_release release;
      run(call);
    });
}

}  // namespace kbfgs
