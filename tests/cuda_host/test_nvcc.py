"""nvcc compiles every .cu for sm_80, sm_90 and sm_100: no spills, and what a kernel may ask for."""

import concurrent.futures
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cuda_host import build

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 90, 100)
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
# Registers per thread that the kernel's own launch shape leaves: 65,536 of a multiprocessor over
# the threads of its resident blocks. (threads per block, blocks per multiprocessor), from the .cu.
RESIDENT = {
    "curvature_kernel": (512, 1),
    "update_kernel": (256, 2),
    "product_kernel": (256, 3),
    "restart_kernel": (256, 4),
    "pair_kernel": (512, 1),
    "damping_kernel": (512, 1),
    "factor_kernel": (256, 2),
    "action_kernel": (256, 3),
    "two_loop_kernel": (256, 1),
    "push_kernel": (512, 1),
    "momentum_kernel": (128, 4),
    "descend_kernel": (128, 4),
    "slope_kernel": (128, 4),
    "output_change_kernel": (128, 4),
    "restore_kernel": (128, 4),
    "small_kernel": (256, 1),
    **dict.fromkeys(
        ("admit_kernel", "judge_kernel", "lengths_kernel", "measure_inputs_kernel"), (32, 4)
    ),
    "measure_pair_kernel": (512, 1),
    **dict.fromkeys(
        ("largest_kernel", "scaled_kernel", "squares_kernel", "normalise_kernel", "quintic_kernel"),
        (256, 4),
    ),
}

FOLDER = build.CACHE.parent / "nvcc"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="needs nvcc 13: a machine with the CUDA toolkit"),
]


def compiled(source: Path, architecture: int, folder: Path) -> Path:
    """Where what ptxas says of the kernels in ``source`` is kept, beside the kernels: by the hash
    of all that goes in."""
    name = build._digest(source, *build.HEADERS, str(architecture), NVCC)
    return folder / f"{source.stem}-{architecture}-{name}.txt"


def report(source: Path, architecture: int, folder: Path) -> str:
    """What ptxas says of the kernels in ``source``."""
    kept = compiled(source, architecture, folder)
    if not kept.exists():
        done = subprocess.run(
            [
                NVCC, "-std=c++20", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin",
                f"-arch=sm_{architecture}", str(source), "-o",
                str(kept.with_suffix(".cubin")),
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        kept.write_text(done.stdout + done.stderr)
    return kept.read_text()


@pytest.fixture(scope="module")
def kernels():
    """(kernel, dtype, architecture) to what it uses."""
    folder = FOLDER
    jobs = [(path, arch) for path in build.KERNELS for arch in ARCHITECTURES]
    with build.alone(folder), concurrent.futures.ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda job: report(*job, folder), jobs))
    found = {}
    for (_, architecture), text in zip(jobs, reports, strict=True):
        parts = re.split(r"Compiling entry function '", text)[1:]
        for part in parts:
            kernel, dtype = re.search(r"\d+([a-z_]+_kernel)I([fd])E", part).groups()
            found[kernel, dtype, architecture] = {
                "stack": int(re.search(r"(\d+) bytes stack frame", part)[1]),
                "stores": int(re.search(r"(\d+) bytes spill stores", part)[1]),
                "loads": int(re.search(r"(\d+) bytes spill loads", part)[1]),
                "registers": int(re.search(r"Used (\d+) registers", part)[1]),
                "shared": int((re.search(r"(\d+) bytes smem", part) or [0, 0])[1]),
            }
    return found


def test_every_kernel_is_there_for_both_types_and_all_targets(kernels):
    assert {key[0] for key in kernels} == set(RESIDENT)
    assert len(kernels) == len(RESIDENT) * 2 * len(ARCHITECTURES)


def test_no_spills(kernels):
    spilling = {
        key: used
        for key, used in kernels.items()
        if used["stores"] or used["loads"] or used["stack"]
    }
    assert not spilling


def test_registers_leave_room_for_the_resident_blocks(kernels):
    for key, used in kernels.items():
        threads, blocks = RESIDENT[key[0]]
        assert used["registers"] * threads * blocks <= 65536, (key, used)


def test_no_static_shared_memory(kernels):
    """All shared memory is asked for at the launch, where the launcher holds it to the device."""
    assert all(used["shared"] == 0 for used in kernels.values())


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that Triton brings."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(Path(NVCC).parent))
    if found is None and (triton := importlib.util.find_spec("triton")):
        brought = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(brought) if brought.exists() else None
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_factors_of_16_bit_inputs_use_tensor_cores(kernels, architecture):
    """Of both 16-bit types, with 32-bit sums; those of 32-bit inputs do not."""
    tool = disassembler()
    if tool is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of Triton")
    source = next(path for path in build.KERNELS if path.stem == "factor_ema_cuda")
    cubin = compiled(source, architecture, FOLDER).with_suffix(".cubin")
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True).stdout
    found = {}
    for part in text.split("Function : ")[1:]:
        dtype = re.match(r"\S*factor_kernelI([fd])E", part)[1]
        found[dtype] = set(re.findall(r"\b[A-Z]*MMA\.\S+", part))
    assert found == {"f": {"HMMA.16816.F32", "HMMA.16816.F32.BF16"}, "d": set()}
