"""Builds csrc/**/*.cu and every bindings_cuda.cpp as C++ for the host, into an importable module.

Objects are kept under build/cuda_host by the hash of everything they are made of, so only the first
run after a change compiles.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path

import pybind11
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CACHE = ROOT / "build" / "cuda_host"
KERNELS = sorted((ROOT / "csrc").rglob("*.cu"))
BINDINGS = sorted((ROOT / "csrc").rglob("bindings_cuda.cpp"))
HEADERS = sorted(
    [*(ROOT / "csrc").rglob("*.cuh"), *(ROOT / "csrc").rglob("*.h"), *HERE.rglob("*.h")]
)

# Products and sums stay apart, as -fmad would join them on the GPU: what is tested is the
# algorithm, and what the kernels promise bit for bit they write with product().
COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-psabi"]
COMMON += ["-Wno-unknown-pragmas", "-DKBFGS_CUDA_HOST"]
FLAVOURS = {
    "plain": ["-O2"],
    "asan": ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"],
}
FLAVOURS["asan"] += ["-fno-sanitize=vptr", "-fno-sanitize-recover=all"]


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which("g++")


def _torch_flags() -> list[str]:
    paths = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    included = [pybind11.get_include(), *paths]
    return [f"-I{ROOT / 'csrc'}", "-DKBFGS_WITH_CUDA", *(f"-isystem{path}" for path in included)]


def _digest(*parts: str | Path) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(part.read_bytes() if isinstance(part, Path) else part.encode())
        state.update(b"\0")
    return state.hexdigest()[:20]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def _compile(source: Path, flags: list[str]) -> Path:
    name = _digest(source, *HEADERS, torch.__version__, *flags)
    out = CACHE / f"{source.stem}-{name}.o"
    if not out.exists():
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        partial = out.with_suffix(".partial")
        _run([compiler(), *flags, *language, "-c", str(source), "-o", str(partial)])
        partial.rename(out)
    return out


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Context: one process at a time fills ``folder``; the others wait and find it filled."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def library(flavour: str = "plain") -> Path:
    """The shared library of the host module, built if it is not there."""
    with alone(CACHE):
        return _library(flavour)


def _library(flavour: str) -> Path:
    flags = [*COMMON, *FLAVOURS[flavour]]
    header = ["-include", str(HERE / "cuda_host.h")]
    jobs = [(path, [*flags, *header]) for path in KERNELS]
    jobs += [(HERE / "cuda_host.cpp", flags)]
    # The bindings touch no element, and torch's headers take a minute with the sanitizers: one
    # object serves every flavour, and its speed is of no account.
    torch_flags = [*COMMON, "-O0", *_torch_flags()]
    # Only a kernel sees threadIdx and its kind as macros: torch's headers have variables so named.
    jobs += [(path, [*torch_flags, "-DKBFGS_CUDA_HOST_TYPES", *header]) for path in BINDINGS]
    name = f"kbfgs_cuda_host_{flavour}"
    jobs += [(HERE / "torch_cuda.cpp", torch_flags)]
    jobs += [(HERE / "module.cpp", [*torch_flags, f"-DKBFGS_HOST_MODULE={name}"])]
    jobs.reverse()  # the longest first
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: _compile(*job), jobs))
    out = CACHE / _digest(*(str(path) for path in objects)) / f"{name}.so"
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        partial = out.with_suffix(".partial")
        torch_lib = Path(torch.__file__).parent / "lib"
        _run([
            compiler(), "-shared", *flags, *map(str, objects), f"-L{torch_lib}", "-ltorch_cpu",
            "-lc10", f"-Wl,-rpath,{torch_lib}", "-o", str(partial),
        ])  # fmt: skip
        partial.rename(out)
    return out


def load(flavour: str = "plain") -> types.ModuleType:
    """The host module, imported."""
    path = library(flavour)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
