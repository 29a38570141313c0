// kbfgs_ext._C: functions <op>cpu and <op>cuda, each taking a call of the op as a dict by argument
// name. They are in their family's bindings_cpu.cpp and bindings_cuda.cpp. Whatever the kernels do not
// take raises Unsupported, always before anything is written.
#include <stdexcept>
#include <string>

#include "common/isa.h"
#include "common/python.h"

#ifdef KBFGS_WITH_CUDA
namespace kbfgs::cuda {
void bind(PyObject* module);  // bindings_cuda.cpp
}
#endif

namespace kbfgs {

namespace {

constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};  // in the order of Isa

// Those that run here; the last is in use.
PyObject* instruction_sets(PyObject*, PyObject*) {
  return python::guarded([] {
    const auto count = static_cast<Py_ssize_t>(widest_isa()) + 1;
    python::Object names = python::owned(PyList_New(count));
    for (Py_ssize_t i = 0; i < count; ++i)
      PyList_SetItem(names.get(), i, python::owned(PyUnicode_FromString(kIsaNames[i])).release());
    return names.release();
  });
}

// For tests of the others.
PyObject* use_instruction_set(PyObject*, PyObject* name) {
  return python::guarded([&] {
    const std::string wanted(python::text(name));
    for (int i = 0; i <= static_cast<int>(widest_isa()); ++i)
      if (wanted == kIsaNames[i]) {
        active_isa().store(static_cast<Isa>(i));
        return Py_NewRef(Py_None);
      }
    throw std::invalid_argument("this processor has no instruction set " + wanted);
  });
}

PyObject* has_cuda(PyObject*, PyObject*) {
#ifdef KBFGS_WITH_CUDA
  return PyBool_FromLong(1);
#else
  return PyBool_FromLong(0);
#endif
}

PyMethodDef kMethods[] = {
    {"instruction_sets", &instruction_sets, METH_NOARGS, nullptr},
    {"use_instruction_set", &use_instruction_set, METH_O, nullptr},
    {"has_cuda", &has_cuda, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

}  // namespace kbfgs

PyMODINIT_FUNC PyInit__C() {
  using namespace kbfgs;
  return python::guarded([] {
    python::Object module = python::owned(PyModule_Create(&kModule));
    python::tensor_type();  // a torch that lacks what is needed is told here
    for (const auto& ops :
         {bfgs_update_ops(), double_damping_ops(), factor_ema_ops(), kron_precondition_ops(),
          lbfgs_two_loop_ops(), safeguard_ops(), spectral_ops()})
      python::define(module.get(), ops);
#ifdef KBFGS_WITH_CUDA
    cuda::bind(module.get());
#endif
    return module.release();
  });
}
