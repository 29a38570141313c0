"""Builds kbfgs_ext._C: the C++ kernels always, the CUDA kernels where nvcc and a CUDA torch are.

KBFGS_CUDA=0 leaves the CUDA kernels out. The binary is of torch's stable interface and of Python's
limited API: it serves every torch and every Python that the package supports. Everything else about
the package stands in pyproject.toml.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
# Ampere, Hopper, Blackwell, and PTX for what comes after.
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"
USUAL_TOOLKIT = Path("/usr/local/cuda")
HEADER = "cuda_runtime_api.h"
# A free-threaded Python has no limited API yet: its binary is its own.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")

os.chdir(HERE)
CUDA_BINDINGS = sorted(Path("csrc").rglob("bindings_cuda.cpp"))
try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        f"kbfgs_ext is built against the installed torch, which does not import: {error}.\n"
        "Install it first (pip install 'torch>=2.11'), or build without --no-build-isolation."
    ) from error


def check_compiler() -> None:
    """Stop with what to install where there is no C++ compiler."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if sys.platform != "win32" and not (shutil.which(compiler) or shutil.which("g++")):
        raise SystemExit(
            f"kbfgs_ext needs a C++20 compiler, and {compiler!r} is not there. Install one:\n"
            "  Debian, Ubuntu: apt-get install g++\n"
            "  Fedora, RHEL:   dnf install gcc-c++\n"
            "  macOS:          xcode-select --install\n"
            "or set CXX to the one you have."
        )


def why_no_cuda() -> str | None:
    """Why the CUDA kernels are left out, or None. A visible GPU is not needed."""
    if os.environ.get("KBFGS_CUDA", "1") == "0":
        return "KBFGS_CUDA=0"
    if not CUDA_BINDINGS:
        return "bindings_cuda.cpp is not in this source tree"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if toolkit() is None:
        named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        if named:
            return f"CUDA_HOME is {named}, which lacks bin/nvcc or include/{HEADER}"
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            return "nvcc was not found (set CUDA_HOME)"
        return f"no toolkit with include/{HEADER} was found for {nvcc} (set CUDA_HOME)"
    return None


def toolkit() -> Path | None:
    """The CUDA toolkit, with its nvcc and its headers: the folder that CUDA_HOME names, if any.

    torch takes the folder above that of the nvcc on the PATH, which may be a wrapper or a link.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        homes = [Path(named)]
    elif nvcc := shutil.which("nvcc"):
        # What it would run (nothing is compiled), and from where.
        said = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        tops = re.findall(r"^#\$ TOP=(.+)$", said, flags=re.M)
        homes = [Path(nvcc).parents[1], Path(nvcc).resolve().parents[1], *map(Path, tops)]
        homes.append(USUAL_TOOLKIT)
    else:
        homes = [USUAL_TOOLKIT]
    for home in homes:
        if (home / "bin/nvcc").is_file() and (home / "include" / HEADER).is_file():
            return home.resolve()
    return None


def extension():
    """The one extension module, with or without CUDA."""
    sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp") if path not in CUDA_BINDINGS)
    # No fast-math: curvature quotients decide signs, and NaN must stay NaN.
    cxx = ["-O3", "-g0", "-std=c++20", "-Wall", "-Wno-psabi", "-fvisibility=hidden"]
    shared = {
        "name": "kbfgs_ext._C",
        "include_dirs": [str(HERE / "csrc")],
        "py_limited_api": LIMITED,
    }
    reason = why_no_cuda()
    if reason is not None:
        print(f"kbfgs_ext: CUDA kernels left out: {reason}")
        return cpp_extension.CppExtension(
            sources=sources, extra_compile_args={"cxx": cxx}, **shared
        )
    cpp_extension.CUDA_HOME = str(toolkit())
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
    kernels = sorted(str(path) for path in Path("csrc").rglob("*.cu"))
    return cpp_extension.CUDAExtension(
        sources=[*sources, *map(str, CUDA_BINDINGS), *kernels],
        define_macros=[("KBFGS_WITH_CUDA", None)],
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-std=c++20", "-lineinfo"]},
        **shared,
    )


class BuildExtension(cpp_extension.BuildExtension):
    """torch's; a binary of this Python alone must not stay in the checkout and be found first."""

    def run(self) -> None:
        super().run()
        if LIMITED:
            Path(f"kbfgs_ext/_C{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)


if __name__ == "__main__":
    check_compiler()
    setup(
        ext_modules=[extension()],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
    )
