"""The kernels compiled ahead of time for GPUs that are not here: what they cost the chip.

Every launch of every op on the MNIST autoencoder is compiled with the arguments it would run with:
no register may spill, shared memory and registers must fit, and where tensor cores are meant their
instructions must be in the machine code.
"""

from __future__ import annotations

import functools
import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton: pip install triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kbfgs_ext.ops.triton_common import COMPILER  # noqa: E402
from tests.helpers import cases  # noqa: E402
from tests.triton import recorder  # noqa: E402

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block can have
REGISTERS = 64 << 10  # of a multiprocessor, the same for all three
TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1",
}  # fmt: skip
TENSOR_CORES = {80: r"\bHMMA\.", 90: r"\bHGMMA\.", 100: r"\bUTC[A-Z]*MMA\b"}


def source(launch: recorder.Launch) -> ASTSource:
    """The kernel with the types of the arguments that it was launched with."""
    kernel = launch.kernel
    given = dict(zip(kernel.arg_names, launch.args, strict=False)) | launch.options
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            if value.dim():  # allocations are aligned, scalars may be slices of anything
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = parameter.annotation_type
    return ASTSource(kernel, signature, constants, attributes)


def compiled(launch: recorder.Launch, arch: int):
    options = {k: v for k, v in launch.options.items() if k in ("num_warps", "num_stages")}
    options |= COMPILER
    return triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=options)


def dump(kernel, what: str, tmp_path) -> str:
    path = tmp_path / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, what, path], capture_output=True, text=True, check=True).stdout


@functools.cache
def launches(dtype: torch.dtype, input_dtype: torch.dtype | None = None):
    """Every launch on the autoencoder, once per kernel and constants."""
    found = {}
    for what, (op, args) in recorder.model_calls("mnist", dtype, input_dtype).items():
        for launch in recorder.launches_of(op, args):
            found.setdefault(source(launch).hash(), (what, launch))
    return list(found.values())


def faults(what: str, launch: recorder.Launch, arch: int, tmp_path) -> list[str]:
    """What is wrong with the compiled kernel."""
    kernel = compiled(launch, arch)
    usage = dump(kernel, "-res-usage", tmp_path)
    registers, stack, local = (
        int(re.search(rf"{word}:(\d+)", usage).group(1)) for word in ("REG", "STACK", "LOCAL")
    )
    registers *= 32 * launch.options.get("num_warps", 4)
    found = {
        f"{stack + local} bytes of spills": stack + local > 0,
        f"{registers} registers in a block": registers > REGISTERS,
        f"{kernel.metadata.shared} bytes of shared memory": kernel.metadata.shared
        > SHARED_MEMORY[arch],
    }
    name = f"{what}, {launch.kernel.__name__}, sm_{arch}"
    return [f"{name}: {fault}" for fault, is_so in found.items() if is_so]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_no_spill_and_it_fits(arch, dtype, tmp_path):
    assert not [f for what, launch in launches(dtype) for f in faults(what, launch, arch, tmp_path)]


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_programs_search_a_table_of_many_rows(arch, tmp_path):
    """The groups of depthwise convolutions: no program looks at thousands of rows."""
    args = cases.measure_pair((3,) * 1100)(torch.float32)
    (launch,) = recorder.launches_of("measure_pair_", args)
    assert "scf.while" in compiled(launch, arch).asm["ttir"]
    assert not faults("measure_pair_", launch, arch, tmp_path)


SQUARES = "factor_ema._squares"
DIRECTION = ("kron_precondition._left", "kron_precondition._right")
POLAR = ("spectral._gram", "spectral._product", "spectral._finish")
PRODUCTS = (SQUARES, *DIRECTION, *POLAR)


def qualified(launch: recorder.Launch) -> str:
    """The kernel's name behind its family's: two families may have one of the same name."""
    return f"{launch.kernel.__module__.split('.')[-2]}.{launch.kernel.__name__}"


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_tensor_cores_where_asked_for(arch, precision, tmp_path):
    """TF32 at "high", bf16 operands at "medium"; at "highest" `polar_` alone, by three products for
    one. A takes no TF32, and 16-bit activations as they are."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        inputs = torch.bfloat16 if precision == "highest" else None
        found = launches.__wrapped__(torch.float32, inputs)
    finally:
        torch.set_float32_matmul_precision(before)
    wanted = {
        "highest": {SQUARES, *POLAR}, "high": {*DIRECTION, *POLAR}, "medium": set(PRODUCTS),
    }[precision]  # fmt: skip
    seen = set()
    for what, launch in found:
        name = qualified(launch)
        if name in wanted and name not in seen:
            seen.add(name)
            assert not faults(what, launch, arch, tmp_path)
            sass = dump(compiled(launch, arch), "-sass", tmp_path)
            assert re.search(TENSOR_CORES[arch], sass), f"{name}, sm_{arch}"
    assert seen == wanted


def test_fp32_products_are_as_exact_as_fp32(tmp_path):
    """By default: three TF32 products for one, or none."""
    seen = set()
    for _, launch in launches(torch.float32):
        name = qualified(launch)
        if name == SQUARES or name in DIRECTION:
            sass = dump(compiled(launch, 90), "-sass", tmp_path)
            assert not re.search(TENSOR_CORES[80], sass)
            assert not re.search(TENSOR_CORES[90], sass)
        elif name in POLAR:
            assert launch.options["PRECISION"] == "tf32x3"
        seen.add(name)
    assert seen >= set(PRODUCTS)


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_rows_of_the_polar_factors_work_are_copied_by_16_bytes(arch):
    """Where they are not Triton copies 4 at a time, which took four times as long on an H100."""
    found = [launch for _, launch in launches(torch.float32)
             if qualified(launch) in PRODUCTS and "spectral" in qualified(launch)]  # fmt: skip
    assert len(found) >= 6
    for launch in found:
        ptx = compiled(launch, arch).asm["ptx"]
        widths = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x[0-9a-f]+)", ptx)
        assert set(widths) == {"0x10"}, launch.kernel.__name__
