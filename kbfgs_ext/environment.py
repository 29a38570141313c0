"""The environment variables of kbfgs_ext, read in this one place and at call time.

=========================  ===================================================================
variable                   meaning
=========================  ===================================================================
``KBFGS_BACKEND``          what ``backend="auto"`` takes: cuda, triton, cpu or reference
``KBFGS_DISABLE_NATIVE``   1: behave as if the compiled extension were not built
``KBFGS_AUTOTUNE``         1: Triton launch configurations are measured, once per shape
``TRITON_INTERPRET``       1: Triton kernels run interpreted, on CPU tensors too (Triton's own)
=========================  ===================================================================
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import types
from typing import Any

import torch


def forced_backend() -> str | None:
    """The backend that ``KBFGS_BACKEND`` asks for, or None."""
    value = os.environ.get("KBFGS_BACKEND", "").strip().lower()
    if value in ("", "auto"):
        return None
    if value not in ("cuda", "triton", "cpu", "reference"):
        raise ValueError(
            f"KBFGS_BACKEND must be auto, cuda, triton, cpu or reference, got {value!r}"
        )
    return value


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def autotune() -> bool:
    """Whether launch configurations are chosen by measurement."""
    return os.environ.get("KBFGS_AUTOTUNE", "0") == "1"


@functools.cache
def _load_native() -> tuple[types.ModuleType | None, str | None]:
    try:
        return importlib.import_module("kbfgs_ext._C"), None
    except ModuleNotFoundError:
        return None, "the compiled extension kbfgs_ext._C is not built (pip install . builds it)"
    except ImportError as error:  # built against another torch or Python
        return None, f"the compiled extension does not load: {error}"


def native() -> Any:
    """The compiled extension, where `native_missing` has nothing to say."""
    return _load_native()[0]


def native_missing() -> str | None:
    """Why there is no compiled extension, or None."""
    if os.environ.get("KBFGS_DISABLE_NATIVE", "0") == "1":
        return "KBFGS_DISABLE_NATIVE=1"
    return _load_native()[1]


def cuda_missing() -> str | None:
    """Why the CUDA kernels cannot run, or None."""
    missing = native_missing()
    if missing:
        return missing
    if not native().has_cuda():
        return "the extension was built without CUDA (nvcc or a CUDA build of torch was missing)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


@functools.cache
def _triton_found() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_missing() -> str | None:
    """Why the Triton kernels cannot run, or None."""
    if not _triton_found():
        return "Triton is not installed"
    if not triton_interpreted() and not torch.cuda.is_available():
        return "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def float32_matmul_precision(device: torch.device) -> str:
    """The precision of fp32 products on ``device``: "highest", "high" (TF32) or "medium" (bf16).

    By `torch.set_float32_matmul_precision` or `fp32_precision` of `torch.backends`, whichever was
    set last: torch's own kernels go by the latter, which the former sets too.
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    setting = backend.matmul.fp32_precision  # of the device, or else what it inherits
    if setting == "tf32":
        try:  # cuBLAS has no bf16 setting: "medium" is there in the old one alone
            old = torch.get_float32_matmul_precision()
        except RuntimeError:  # some setting of the new interface contradicts the old one
            return "high"
        return "medium" if old == "medium" else "high"
    return "medium" if setting == "bf16" else "highest"


def summary() -> str:
    """One line each for what is there and what is missing."""
    lines = [f"torch {torch.__version__}"]
    for name, missing in (
        ("compiled extension", native_missing()),
        ("CUDA kernels", cuda_missing()),
        ("Triton kernels", triton_missing()),
    ):
        lines.append(f"{name}: {'ready' if missing is None else 'missing, ' + missing}")
    return "\n".join(lines)
