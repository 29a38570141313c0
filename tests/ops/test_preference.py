"""Which backend "auto" tries first, where that is not the usual order."""

import pytest
import torch

from kbfgs_ext.ops import registry
from kbfgs_ext.ops.lbfgs_two_loop.api import compact_pays
from tests.helpers import calls, cases

TRITON_FIRST = ("triton", "cuda", "cpu", "reference")


def test_most_ops_keep_the_order():
    for op in registry.ops():
        wanted = TRITON_FIRST if op == "polar_" else registry.BACKENDS
        assert registry.order(op) == wanted, op


@pytest.mark.parametrize(
    ("form", "pairs", "first"),
    [
        ("auto", 13, "cuda"),
        ("auto", 14, "triton"),
        ("recursion", 100, "cuda"),
        ("compact", 2, "triton"),
    ],
)
def test_many_pairs_go_where_the_compact_form_is_three_launches(form, pairs, first):
    call = cases.two_loop((5, 7), pairs, 3, 4, form)(torch.float32)
    assert registry.order("lbfgs_two_loop_", call)[0] == first
    assert registry.order("lbfgs_two_loop_", calls.empty(call))[0] == (
        "triton" if form == "compact" else "cuda"
    )


def test_the_model_of_both_forms():
    """1.4 us a pair against 0.3 us a pair and 15 us of launches."""
    assert next(p for p in range(1, 30) if compact_pays(p)) == 14


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
