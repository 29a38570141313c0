"""The bytes that the READMEs' tables reckon with are the ones that the kernels access."""

import collections
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
    """Bytes of matrices accessed: per launch, every address once for reading and for writing."""

    def __init__(self) -> None:
        self.bytes = 0
        self._seen: dict[tuple[str, int], list[np.ndarray]] = collections.defaultdict(list)

    def of(self, launch):
        """A launch function that counts."""

        def counting(*args, **options) -> None:
            launch(*args, **options)
            for (_, size), addresses in self._seen.items():
                self.bytes += size * len(np.unique(np.concatenate(addresses)))
            self._seen.clear()

        return counting

    def note(self, what: str, pointers, mask) -> None:
        if pointers.data.ndim == 2 and min(pointers.data.shape) > 1:
            size = pointers.get_element_ty().primitive_bitwidth // 8
            self._seen[what, size].append(pointers.data[mask.data.astype(bool)])


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


@pytest.mark.parametrize(
    ("what", "half"),
    [*((what, False) for what in sorted(traffic.TRITON)), *((w, True) for w in traffic.READING_X)],
)
def test_bytes_are_the_ones_of_the_tables(what, half):
    X = torch.float16 if half else None
    op, args = recorder.calls_of(SIZES, torch.float32, X, batch=BATCH)[what]
    for arg in args.values():
        fill(arg)
    with counted() as counter:
        calls.call(op, args, "triton")
    model = traffic.layers(SIZES, BATCH, 2 if half else traffic.FP32)
    reckoned = traffic.TRITON[what](model)
    assert 0.99 * reckoned <= counter.bytes <= EDGE * reckoned
