"""The op schemas, on one screen, and their registration with ``torch.library``.

Every op takes lists with one entry per layer: all layers of a model in one call (`judge_`: one per
judgement). Arguments marked ``(x!)`` are written, the others are read only; no op returns anything.
``ok`` is a bool scalar on the device: where it is false the op leaves its named outputs as they
were. ``backend`` is "auto", "reference", "cpu", "cuda" or "triton". Shapes and equations stand in
each family's ``api.py``, symbols in this folder's README.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kbfgs_ext.ops import registry

SCHEMAS = (
    # factor_ema
    "factor_ema_(Tensor(a!)[] A, Tensor(b!)[] a_bar, Tensor[] X, float decay, Tensor? ok=None,"
    ' str backend="auto") -> ()',
    "hessian_action_(Tensor(a!)[] y, Tensor[] X, Tensor[] s, Tensor[] lam,"
    ' str backend="auto") -> ()',
    # double_damping
    "pair_ema_(Tensor(a!)[] s, Tensor(b!)[] y, Tensor[] h_bar, Tensor[] h_bar_next,"
    " Tensor[] g_bar, Tensor[] g_bar_next, float decay, Tensor? ok=None,"
    ' str backend="auto") -> ()',
    "double_damping_(Tensor(a!)[] s, Tensor(b!)[] y, Tensor(c!)[] Hy, Tensor(d!)[] counts,"
    ' Tensor[] H, Tensor[] lam, float mu1, Tensor? ok=None, str backend="auto") -> ()',
    # bfgs_update
    "bfgs_update_(Tensor(a!)[] H, Tensor(b!)[] counts, Tensor[] s, Tensor[] y, Tensor[] Hy,"
    ' Tensor[] c, Tensor? ok=None, str backend="auto") -> ()',
    "curvature_update_(Tensor(a!)[] H_a, Tensor(b!)[] H_g, Tensor(c!)[] s, Tensor(d!)[] y,"
    " Tensor(e!)[] counts_a, Tensor(f!)[] counts_g, Tensor(g!)[] work, Tensor[] A, Tensor[] X,"
    " Tensor[] a_bar, Tensor[] h_bar, Tensor[] h_bar_next, Tensor[] g_bar, Tensor[] g_bar_next,"
    " Tensor[] lam_a, Tensor[] lam_g, float pair_decay, float mu1, Tensor? ok=None,"
    ' Tensor? ok_pair=None, str backend="auto") -> ()',
    "restart_(Tensor(a!)[] H, Tensor(b!)[] pushed, Tensor(c!)[] marks, Tensor[] counts,"
    " Tensor[] lam, Tensor[] A, Tensor[] X, int after, Tensor? force=None,"
    ' str backend="auto") -> ()',
    # lbfgs_two_loop
    "lbfgs_two_loop_(Tensor(a!)[] out, Tensor[] Q, Tensor[] S, Tensor[] Y, Tensor[] rho,"
    ' Tensor[] pushed, str form="auto", str backend="auto") -> ()',
    "lbfgs_push_(Tensor(a!)[] S, Tensor(b!)[] Y, Tensor(c!)[] rho, Tensor(d!)[] pushed,"
    " Tensor(e!)[] counts, Tensor[] s, Tensor[] y, Tensor[] c, Tensor? ok=None,"
    ' str backend="auto") -> ()',
    # kron_precondition
    "kron_precondition_(Tensor(a!)[] P, Tensor[] H_g, Tensor[] M, Tensor[] H_a, Tensor(b!)[] work,"
    ' str backend="auto") -> ()',
    "momentum_(Tensor(a!)[] M, Tensor[] dW, Tensor[] db, Tensor[] W, Tensor[] b,"
    ' float momentum, float weight_decay, Tensor? ok=None, str backend="auto") -> ()',
    "descend_(Tensor(a!)[] W, Tensor(b!)[] b, Tensor(c!)[] P, Tensor[] step_size, Tensor? ok=None,"
    ' str backend="auto") -> ()',
    "slope_(Tensor(a!)[] slope, Tensor[] W, Tensor[] b, Tensor[] saved, Tensor[] dW, Tensor[] db,"
    ' str backend="auto") -> ()',
    "output_change_(Tensor(a!)[] change, Tensor[] W, Tensor[] b, Tensor[] saved, Tensor[] a_bar,"
    ' Tensor[] a_bar_next, str backend="auto") -> ()',
    "restore_(Tensor(a!)[] W, Tensor(b!)[] b, Tensor[] saved, Tensor undo,"
    ' str backend="auto") -> ()',
    "kron_step_(Tensor(a!)[] W, Tensor(b!)[] b, Tensor(c!)[] M, Tensor(d!)[] P, Tensor(e!)[] work,"
    " Tensor[] dW, Tensor[] db, Tensor[] H_g, Tensor[] H_a, Tensor[] step_size, float momentum,"
    ' float weight_decay, Tensor? ok=None, str backend="auto") -> ()',
    # safeguard
    "judge_(Tensor(a!)[] scale, Tensor(b!)[] watched, Tensor(c!)[] counts, Tensor(d!)[] decision,"
    " Tensor[] loss, Tensor[] loss_next, Tensor[] slope, float noise, float shrink, float grow,"
    " float sufficient, float smallest, float surge, int window, int? restart_after=None,"
    ' Tensor? ok=None, str backend="auto") -> ()',
)

KERNELS: dict[str, Callable[..., None]] = {}  # what the dispatcher calls, by the op's name

_library = torch.library.Library("kbfgs_ext", "DEF")


def _define(schema: str) -> None:
    name = schema.split("(", 1)[0]
    _library.define(schema)
    arguments = getattr(torch.ops.kbfgs_ext, name).default._schema.arguments

    def call(*args, **kwargs) -> None:
        if len(args) < len(arguments):  # the dispatcher hands over only what the caller gave
            rest = arguments[len(args) :]
            args += tuple(kwargs.get(given.name, given.default_value) for given in rest)
        registry.run(name, args[-1], args[:-1])

    KERNELS[name] = call
    _library.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kbfgs_ext::{name}", lambda *args, **kwargs: None, lib=_library)


for _schema in SCHEMAS:
    _define(_schema)
