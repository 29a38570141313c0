// The one place that knows Python: a dict becomes a Call, functions of a Call enter a module. Python's
// limited API alone, so that a binary serves every Python from the oldest supported on; tensors are
// read by DLPack's exchange API, which torch.Tensor offers (no ownership, no allocation).
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../bindings.h"
#include "arguments.h"

namespace kbfgs::python {

struct ErrorSet {};  // thrown where Python has an exception set

struct Release {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Object = std::unique_ptr<PyObject, Release>;  // an owned reference

// What came of a call that returns a new reference.
inline Object owned(PyObject* object) {
  if (object == nullptr) throw ErrorSet();
  return Object(object);
}

inline Object attribute(const char* module, const char* name) {
  return owned(PyObject_GetAttrString(owned(PyImport_ImportModule(module)).get(), name));
}

// torch.Tensor, and how a tensor is looked at.
struct TensorType {
  PyObject* type;
  PyObject* is_neg;
  int (*view)(void* object, dlpack::View* out);

  TensorType() {
    Object found = attribute("torch", "Tensor");
    is_neg = owned(PyObject_GetAttrString(found.get(), "is_neg")).release();
    const Object table = owned(PyObject_GetAttrString(found.get(), "__dlpack_c_exchange_api__"));
    const auto* api = static_cast<const dlpack::Table*>(
        PyCapsule_GetPointer(table.get(), "dlpack_exchange_api"));
    if (api == nullptr) throw ErrorSet();
    while (api != nullptr && api->major != dlpack::kMajor) api = api->older;
    if (api == nullptr) throw std::runtime_error("torch has another version of DLPack");
    view = api->view;
    type = found.release();
  }
};

inline const TensorType& tensor_type() {
  static const TensorType known;
  return known;
}

// Whether its elements are in memory as they are. torch negates lazily only what is the imaginary part
// of a conjugate: it has gaps, or is one number at an odd place. No other tensor is asked.
inline bool plain(const Tensor& tensor, PyObject* object) {
  if (tensor.data() == nullptr && tensor.numel() > 0) return false;  // a fake one
  if (tensor.dtype().code != dlpack::kFloat) return true;
  const auto place = reinterpret_cast<uintptr_t>(tensor.data()) / (tensor.dtype().bits / 8);
  const bool odd = tensor.numel() == 1 && place % 2 == 1;
  if (tensor.is_contiguous() && !odd) return true;
  const Object negated =
      owned(PyObject_CallFunctionObjArgs(tensor_type().is_neg, object, nullptr));
  return negated.get() != Py_True;
}

inline Tensor tensor(std::string_view name, PyObject* object, const char* otherwise) {
  dlpack::View view;
  if (tensor_type().view(object, &view) == 0) {
    const Tensor found(view);
    if (plain(found, object)) return found;
  } else {
    PyErr_Clear();
    if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(tensor_type().type)))
      throw std::invalid_argument(std::string(name) + otherwise);
  }
  throw Unsupported(std::string(name) + " is not a plain tensor");
}

inline double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw ErrorSet();
  return value;
}

inline int64_t integer(PyObject* object) {
  const long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw ErrorSet();
  return value;
}

inline std::string_view text(PyObject* object) {
  Py_ssize_t length = 0;
  const char* data = PyUnicode_AsUTF8AndSize(object, &length);
  if (data == nullptr) throw ErrorSet();
  return {data, static_cast<size_t>(length)};
}

inline Call::Value list(std::string_view name, PyObject* tuple) {
  const Py_ssize_t size = PyTuple_Size(tuple);
  if (size > 0 && PyFloat_Check(PyTuple_GetItem(tuple, 0))) {
    Call::Numbers numbers;
    for (Py_ssize_t i = 0; i < size; ++i) numbers.push_back(number(PyTuple_GetItem(tuple, i)));
    return numbers;
  }
  Tensors tensors;
  tensors.reserve(static_cast<size_t>(size));
  for (Py_ssize_t i = 0; i < size; ++i)
    tensors.push_back(tensor(name, PyTuple_GetItem(tuple, i), " must be a list of tensors"));
  return tensors;
}

// A call's arguments, and what keeps its tensors alive where other threads run meanwhile.
struct Arguments {
  std::vector<Call::Named> named;
  std::vector<Object> held;

  explicit Arguments(PyObject* dict) {
    if (!PyDict_Check(dict)) throw std::invalid_argument("a call must be a dict");
    const Py_ssize_t size = PyDict_Size(dict);
    named.reserve(static_cast<size_t>(size));
    held.reserve(static_cast<size_t>(size));
    PyObject *key, *value;
    for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &key, &value);) {
      const std::string_view name = text(key);
      named.emplace_back(name, converted(name, value));
    }
  }

 private:
  Call::Value converted(std::string_view name, PyObject* value) {
    if (value == Py_None) return {};
    if (PyList_Check(value) || PyTuple_Check(value)) {
      held.push_back(owned(PySequence_Tuple(value)));
      return list(name, held.back().get());
    }
    if (PyFloat_Check(value)) return number(value);
    if (PyLong_Check(value)) return integer(value);
    if (PyUnicode_Check(value)) return std::string(text(value));
    held.push_back(owned(Py_NewRef(value)));
    return tensor(name, value, " is of a type that no op takes");
  }
};

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  ~WithoutGil() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

// body(), with its exception set as Python's where it throws: then null.
template <class Body>
PyObject* guarded(const Body& body) {
  try {
    return body();
  } catch (const ErrorSet&) {
  } catch (const Unsupported& reason) {
    try {
      PyErr_SetString(attribute("kbfgs_ext.ops.registry", "Unsupported").get(), reason.what());
    } catch (const ErrorSet&) {
    }
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::out_of_range& error) {
    PyErr_SetString(PyExc_IndexError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// `function`, a capsule of a pointer to it, on a call of the op as a dict.
inline PyObject* run(PyObject* function, PyObject* dict) {
  return guarded([&] {
    const auto* entry =
        static_cast<const Functions::value_type*>(PyCapsule_GetPointer(function, nullptr));
    if (entry == nullptr) throw ErrorSet();
    Arguments arguments(dict);
    const Call call(std::move(arguments.named));
    {
      const WithoutGil released;
      entry->second(call);
    }
    return Py_NewRef(Py_None);
  });
}

// Both live as long as the process, as Python wants it of what a module refers to.
inline void define(PyObject* module, const Functions& functions) {
  static std::deque<std::pair<Functions::value_type, PyMethodDef>> known;
  for (const auto& function : functions) {
    auto& [entry, method] =
        known.emplace_back(function, PyMethodDef{function.first, &run, METH_O, nullptr});
    const Object capsule = owned(PyCapsule_New(&entry, nullptr, nullptr));
    const Object callable = owned(PyCFunction_NewEx(&method, capsule.get(), nullptr));
    if (PyModule_AddObjectRef(module, function.first, callable.get()) != 0) throw ErrorSet();
  }
}

}  // namespace kbfgs::python
