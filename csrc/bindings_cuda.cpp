// The CUDA half of kbfgs_ext._C, as bindings.cpp. Nothing in it reads from the device.
#include "common/python.h"
#include "lbfgs_two_loop/lbfgs_two_loop_cuda.h"

namespace kbfgs::cuda {

void bind(pybind11::module_& module) {
  for (const auto& ops :
       {bfgs_update_ops(), double_damping_ops(), factor_ema_ops(), kron_precondition_ops(),
        lbfgs_two_loop_ops(), safeguard_ops(), spectral_ops()})
    define(module, ops);
  module.def("two_loop_fits", &two_loop_fits);
}

}  // namespace kbfgs::cuda
