"""What triton_common.py puts right in Triton's interpreter, whichever version is installed."""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from kbfgs_ext.ops import triton_common  # noqa: F401 (puts it right)


def test_a_comparison_of_scalars_spreads_as_a_mask():
    builder = InterpreterBuilder()
    one, two = (TensorHandle(np.array([value], np.int32), tl.int32) for value in (1, 2))
    less = builder.create_icmpSLT(one, two)
    assert less.dtype == tl.int1
    mask = builder.create_splat(tl.block_type(tl.int1, [4]), less)
    assert mask.dtype == tl.int1 and mask.data.dtype == bool and mask.data.all()
