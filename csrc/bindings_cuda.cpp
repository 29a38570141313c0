// The CUDA half of kbfgs_ext._C, as bindings.cpp. Nothing in it reads from the device.
#include "bindings.h"

namespace kbfgs::cuda {

void bind(pybind11::module_& module) {
  bind_bfgs_update(module);
  bind_double_damping(module);
  bind_factor_ema(module);
  bind_kron_precondition(module);
  bind_lbfgs_two_loop(module);
  bind_safeguard(module);
}

}  // namespace kbfgs::cuda
