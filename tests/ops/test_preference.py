"""Which backend "auto" tries first, where that is not the usual order."""

import pytest
import torch

from kbfgs_ext import environment
from kbfgs_ext.ops import registry
from tests.helpers import calls, cases

TRITON_FIRST = ("triton", "cuda", "cpu", "reference")


def test_most_ops_keep_the_order():
    for op in registry.ops():
        wanted = TRITON_FIRST if op == "polar_" else registry.BACKENDS
        assert registry.order(op) == wanted, op


@pytest.mark.parametrize(
    ("form", "columns", "first"),
    [
        ("auto", 3, "triton"),
        ("auto", None, "cuda"),
        ("recursion", 3, "triton"),
        ("recursion", None, "cuda"),
        ("compact", None, "triton"),
    ],
)
def test_matrices_go_to_the_faster_recursion(form, columns, first):
    call = cases.two_loop((5, 7), 2, 2, columns, form)(torch.float32)
    assert registry.order("lbfgs_two_loop_", call)[0] == first
    assert registry.order("lbfgs_two_loop_", calls.empty(call))[0] == (
        "triton" if form == "compact" else "cuda"
    )


@pytest.mark.parametrize("op", ["kron_precondition_", "kron_step_"])
def test_directions_in_tf32_go_to_triton(op, monkeypatch):
    call = cases.first(op).build(torch.float32)
    for precision, first in (("highest", "cuda"), ("high", "triton"), ("medium", "triton")):
        monkeypatch.setattr(environment, "float32_matmul_precision", lambda device, p=precision: p)
        assert registry.order(op, call)[0] == first
        assert registry.order(op, cases.first(op).build(torch.float64))[0] == "cuda"


def test_a_named_backend_is_taken_all_the_same(monkeypatch):
    taken = []
    for backend in ("cuda", "triton"):
        fake = registry.Implementation(
            "polar_", backend, lambda call, b=backend: taken.append(b), lambda: None
        )
        monkeypatch.setitem(registry._TABLE["polar_"], backend, fake)
    monkeypatch.setattr(registry, "_wrong_device", lambda backend, values: None)
    call = cases.first("polar_").build(torch.float32)
    for backend in ("auto", "cuda", "triton"):
        registry.run("polar_", backend, call)
    assert taken == ["triton", "cuda", "triton"]


@pytest.mark.parametrize(("dtype", "first"), [(torch.float32, "triton"), (torch.float64, "cuda")])
@pytest.mark.parametrize("cut", [lambda t: [t[:, :3], t[:, 3:]], lambda t: [t[:2], t[2:]]])
def test_directions_in_blocks_go_to_triton(dtype, first, cut):
    tiles = cut(torch.zeros(4, 6, dtype=dtype))
    call = dict.fromkeys(("P", "M", "work", "H_g", "H_a"), tiles)
    assert registry.order("kron_precondition_", call)[0] == first
