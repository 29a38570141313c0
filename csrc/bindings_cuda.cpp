// The CUDA half of kbfgs_ext._C, as bindings.cpp. Nothing in it reads from the device.
#include "common/python.h"
#include "lbfgs_two_loop/lbfgs_two_loop_cuda.h"

namespace kbfgs::cuda {

namespace {

PyObject* fits(PyObject*, PyObject* arguments) {
  return python::guarded([&] {
    long long n, columns, p, element_bytes;
    if (!PyArg_ParseTuple(arguments, "LLLL", &n, &columns, &p, &element_bytes))
      throw python::ErrorSet();
    return PyBool_FromLong(two_loop_fits(n, columns, p, element_bytes));
  });
}

PyMethodDef kMethods[] = {
    {"two_loop_fits", &fits, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind(PyObject* module) {
  for (const auto& ops :
       {bfgs_update_ops(), double_damping_ops(), factor_ema_ops(), kron_precondition_ops(),
        lbfgs_two_loop_ops(), safeguard_ops(), spectral_ops()})
    python::define(module, ops);
  if (PyModule_AddFunctions(module, kMethods) != 0) throw python::ErrorSet();
}

}  // namespace kbfgs::cuda
