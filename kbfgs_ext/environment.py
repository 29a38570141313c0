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
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import re
import types
import warnings
from pathlib import Path
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


_REBUILD = "`pip install --force-reinstall --no-deps --no-build-isolation .`"


def needs_torch(binary: Path) -> str | None:
    """The oldest torch that ``binary`` works with, read from its file; None is unknown."""
    with binary.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        found = re.search(rb"kbfgs_ext needs torch ([0-9]+\.[0-9]+)", text)
        return found[1].decode() if found else None


def _minor(version: str) -> tuple[int, ...]:
    """(2, 13) of 2.13.0+cpu."""
    return tuple(int(part) for part in version.split(".")[:2])


def _binary() -> Path | None:
    """The compiled extension of this Python, or None."""
    spec = importlib.util.find_spec("kbfgs_ext._C")
    return Path(spec.origin) if spec is not None and spec.origin else None


def _misfit(binary: Path) -> str | None:
    """Why ``binary`` must not be loaded into this torch, or None.

    It is of torch's stable interface: what works with one torch works with the later ones.
    """
    needed, here = needs_torch(binary), torch.__version__
    if needed is None:  # one for one torch alone, which misreads dtypes under others
        return f"{binary.name} is of an older kbfgs_ext: delete it and rebuild with {_REBUILD}"
    if _minor(needed) > _minor(here):
        return f"it needs torch {needed} or newer, this is {here}"
    return None


@functools.cache
def _load_native() -> tuple[types.ModuleType | None, str | None]:
    """The compiled extension, or why there is none; warns where there is one that cannot serve."""
    binary = _binary()
    if binary is None:
        others = sorted(path.name for path in Path(__file__).parent.glob("_C.*.so"))
        if not others:
            return None, "the compiled extension is not built (pip install . builds it)"
        reason: str | None = (
            f"built for another Python ({', '.join(others)}): rebuild with {_REBUILD}"
        )
    else:
        reason = _misfit(binary)
        if reason is None:
            try:
                return importlib.import_module("kbfgs_ext._C"), None
            except ImportError as error:  # a library that is missing, a CUDA build on a CPU torch
                reason = f"does not load: {error}"
    warnings.warn(
        f"kbfgs_ext: the compiled extension is not used: {reason}. Ops run on Triton or on the"
        " reference backend, which is slower; KBFGS_DISABLE_NATIVE=1 asks for that and is silent.",
        stacklevel=2,
    )
    return None, f"the compiled extension is not used: {reason}"


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


def versions() -> str:
    """Those in use: of this package, torch, its CUDA, Triton and Python."""
    triton = "not installed"
    if _triton_found():
        try:
            triton = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:  # of a distribution with another name
            triton = importlib.import_module("triton").__version__
    own = importlib.import_module("kbfgs_ext").__version__
    cuda = f" (CUDA {torch.version.cuda})" if torch.version.cuda else ""
    python = platform.python_version()
    return f"kbfgs_ext {own}, torch {torch.__version__}{cuda}, Triton {triton}, Python {python}"


def summary() -> str:
    """One line each for what is in use, what is there and what is missing."""
    lines = [versions()]
    for name, missing in (
        ("compiled extension", native_missing()),
        ("CUDA kernels", cuda_missing()),
        ("Triton kernels", triton_missing()),
    ):
        lines.append(f"{name}: {'ready' if missing is None else 'missing, ' + missing}")
    return "\n".join(lines)
