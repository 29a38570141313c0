"""The bytes that the READMEs' tables reckon with are the ones that the kernels access."""

import contextlib
from unittest import mock

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from tests.helpers import calls, traffic
from tests.triton import recorder

SIZES, BATCH = (196, 250, 62), 96  # the interpreter is slow
EDGE = 1.12  # tiles on the diagonal of a triangle are whole: more than half of a matrix this small


class Counter:
    """Elements of matrices accessed: per launch, every address once for reading and for writing."""

    def __init__(self) -> None:
        self.elements = 0
        self._seen: dict[str, list[np.ndarray]] = {"read": [], "written": []}

    def of(self, launch):
        """A launch function that counts."""

        def counting(*args, **options) -> None:
            launch(*args, **options)
            for addresses in self._seen.values():
                if addresses:
                    self.elements += len(np.unique(np.concatenate(addresses)))
                addresses.clear()

        return counting

    def note(self, what: str, pointers, mask) -> None:
        if pointers.data.ndim == 2 and min(pointers.data.shape) > 1:
            self._seen[what].append(pointers.data[mask.data.astype(bool)])


@contextlib.contextmanager
def counted():
    counter = Counter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def noted_load(self, pointers, mask, *rest):
        counter.note("read", pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self, pointers, value, mask, *rest):
        counter.note("written", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context
        patch(mock.patch.object(InterpreterBuilder, "create_masked_load", noted_load))
        patch(mock.patch.object(InterpreterBuilder, "create_masked_store", noted_store))
        for module in recorder.triton_modules():
            patch(mock.patch.object(module, "launch", counter.of(module.launch)))
        yield counter


def fill(arg) -> None:
    for tensor in arg if isinstance(arg, list) else [arg]:
        if isinstance(tensor, torch.Tensor):
            if tensor.dtype == torch.bool:
                tensor.fill_(True)
            elif tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]:
                tensor.copy_(torch.eye(len(tensor)))
            else:  # lam = 1/2, s = y: every pair is accepted as it is
                tensor.fill_(1 if tensor.dim() else 0.5)


@pytest.mark.parametrize("what", sorted(traffic.TRITON))
def test_bytes_are_the_ones_of_the_tables(what):
    op, args = recorder.calls_of(SIZES, torch.float32, batch=BATCH)[what]
    for arg in args.values():
        fill(arg)
    with counted() as counter:
        calls.call(op, args, "triton")
    reckoned = traffic.TRITON[what](traffic.layers(SIZES, BATCH)) / traffic.FP32
    assert 0.99 * reckoned <= counter.elements <= EDGE * reckoned
