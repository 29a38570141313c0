// Each family puts its ops into the module: <family>/bindings_cpu.cpp and bindings_cuda.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace kbfgs {

void bind_bfgs_update(pybind11::module_& module);
void bind_double_damping(pybind11::module_& module);
void bind_factor_ema(pybind11::module_& module);
void bind_kron_precondition(pybind11::module_& module);
void bind_lbfgs_two_loop(pybind11::module_& module);
void bind_safeguard(pybind11::module_& module);

namespace cuda {

void bind(pybind11::module_& module);  // all families

void bind_bfgs_update(pybind11::module_& module);
void bind_double_damping(pybind11::module_& module);
void bind_factor_ema(pybind11::module_& module);
void bind_kron_precondition(pybind11::module_& module);
void bind_lbfgs_two_loop(pybind11::module_& module);
void bind_safeguard(pybind11::module_& module);

}  // namespace cuda

}  // namespace kbfgs
