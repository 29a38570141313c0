"""The microbenchmarks: what they time, the gate before it, their rows, and the guard."""

import dataclasses
import json
import time

import pytest
import torch

from benchmarks import report
from kbfgs_ext.bench import __main__ as micro
from kbfgs_ext.bench import check, clock, measure
from kbfgs_ext.bench.cases import (
    APART,
    BLAS,
    COMPILED,
    EAGER,
    KERNELS,
    Case,
    cases,
    compiled,
    providers,
    shapes,
    why_not_compiled,
)
from kbfgs_ext.bench.gate import Gate, copies, written
from kbfgs_ext.bench.kernel import Layer
from kbfgs_ext.ops import registry
from tests.helpers import backends

CPU = torch.device("cpu")
CEILING = clock.Ceiling(1e10, 1e11)
SMALL = (Layer(30, 7), Layer(12, 33, bias=False))
SHORT = ["--seconds", "0.001", "--device", "cpu", "--threads", "1"]


def small(name: str) -> Case:
    return Case(next(k for k in KERNELS if k.name == name), "small", SMALL)


@pytest.fixture
def kernel_of(monkeypatch):
    """Puts another implementation in the place of the cpu backend's."""

    def put(op, run):
        fake = registry.Implementation(op, "cpu", run, lambda: None)
        monkeypatch.setitem(registry._TABLE[op], "cpu", fake)

    return put


@pytest.fixture(autouse=True)
def no_ceiling(monkeypatch):
    """The ceiling takes seconds to measure: not here."""
    monkeypatch.setattr(micro, "ceiling", lambda device: CEILING)


# ------------------------------------------------------------------ what is timed


def test_every_op_is_timed_under_its_family():
    assert {kernel.op for kernel in KERNELS} == set(registry.ops())
    for kernel in KERNELS:
        build = getattr(kernel.build, "func", kernel.build)  # behind a partial
        assert build.__module__ == f"kbfgs_ext.bench.{registry.ops()[kernel.op]}"
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)


def test_shapes_are_the_papers_and_squares():
    found = shapes()
    assert found["mnist 784-1000"] == (Layer(784, 1000),)
    assert [x.d_out for x in found["faces"]] == [2000, 1000, 500, 30, 500, 1000, 2000, 625]
    assert len(found["curves"]) == 12
    assert found["square 4096"] == (Layer(4096, 4096, bias=False),)
    assert {case.shape for case in cases(full=True)} == set(found)
    two_loop = [c for c in cases() if c.key == ("lbfgs_two_loop_, p = 100", "mnist 784-1000")]
    args = two_loop[0].build("meta")
    assert [(q.shape, s.shape) for q, s in zip(args["Q"], args["S"], strict=True)] == [
        ((1000, 785), (100, 1000))
    ]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_every_provider_passes_the_gate_and_can_be_repeated(kernel):
    """Timing repeats a call on its own results: they must neither grow, fade nor be rejected."""
    case = small(kernel.name)
    args = case.build(CPU)
    gate = Gate(kernel.op, args)
    found = providers(case, CPU)
    assert next(iter(found)) == EAGER
    assert (BLAS in found) == (kernel.blas is not None)
    for name, run in found.items():
        mine = copies(args)
        run(mine)
        assert gate.verdict(mine) is None, name
        for _ in range(19):
            run(mine)
        for argument, tensor in written(kernel.op, mine):
            if argument.startswith("counts"):
                assert tensor.tolist() in ([0, 0, 0, 0], [20, 0, 0, 0])
            elif argument.startswith("decision"):
                assert not tensor[:3].any()  # nothing to undo, nothing to restart
            elif tensor.is_floating_point() and tensor.numel():
                assert 1e-20 < tensor.abs().max() < 1e6


@pytest.mark.slow  # compiles C++
def test_compiled_reference_passes_the_gate():
    case = Case(small("pair_ema_").kernel, "square 32", shapes()["square 32"])
    args = case.build(CPU)
    mine = copies(args)
    compiled(case)(mine)
    assert Gate("pair_ema_", args).verdict(mine) is None


def test_why_not_compiled():
    by = {case.key: case for case in cases(full=True)}
    assert why_not_compiled(by["bfgs_update_", "mnist"]) is None
    assert why_not_compiled(by["lbfgs_two_loop_, p = 10", "mnist 784-1000"]) is None
    assert "unroll" in why_not_compiled(by["lbfgs_two_loop_, p = 10", "mnist"])


# ------------------------------------------------------------------ the gate


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda args: args["H"][1].mul_(1 + 1e-5), r"H\[1\]: error"),
        (lambda args: args["H"][0].fill_(float("nan")), r"H\[0\]: not finite"),
        (
            lambda args: args["counts"][0].add_(1),
            r"counts\[0\]: \[2, 1, 1, 1\], not \[1, 0, 0, 0\]",
        ),
        (lambda args: None, None),
    ],
)
def test_gate_sees_what_is_wrong(spoil, message):
    args = small("bfgs_update_").build(CPU)
    got = copies(args)
    registry.implementation("bfgs_update_", "reference").run(got)
    spoil(got)
    verdict = Gate("bfgs_update_", args).verdict(got)
    if message is None:
        assert verdict is None
    else:
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(verdict)


@backends.needs_native
def test_what_is_wrong_gets_no_time(kernel_of, tmp_path, capsys):
    kernel_of("momentum_", lambda call: call["M"][0].fill_(0))
    path = tmp_path / "micro.jsonl"
    asked = ["--kernel", "momentum_", "--shape", "square 32", "--json", str(path), *SHORT]
    assert micro.main(asked) == 1
    (wrong,) = [row for row in measure.load(path) if row["provider"] == "cpu"]
    assert wrong["us"] is None and wrong["ratio_to_eager"] is None
    assert wrong["note"].startswith("wrong: M[0]: error")
    (printed,) = [x for x in capsys.readouterr().out.splitlines() if "wrong" in x]
    assert " us" not in printed


# ------------------------------------------------------------------ rows


@backends.needs_native
def test_rows_hold_what_a_row_must(tmp_path, capsys):
    path = tmp_path / "micro.jsonl"
    asked = ["--kernel", "hessian", "--shape", "square 32", "--json", str(path), *SHORT]
    for _ in range(2):  # the second run takes the place of the first
        assert micro.main(asked) == 0
    timed = measure.load(path)
    assert [row["provider"] for row in timed] == [EAGER, BLAS, "cpu"]
    for row in timed:
        assert {"commit", "dirty", "device", "driver", "torch", "cuda", "triton"} <= set(row)
        assert row["layers"] == [[32, 32]] and row["batch_size"] == 1000
        assert (row["precision"], row["seed"], row["threads"]) == ("fp32", 0, 1)
        assert 0 < row["us"]["q20"] <= row["us"]["q50"] <= row["us"]["q80"]
        assert row["rounds"] >= clock.FEWEST_ROUNDS
        seconds = row["us"]["q50"] * 1e-6
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / seconds / 1e9)
        assert row["bound"] == "memory"
        assert row["share_of_ceiling"] == pytest.approx(row["gb_per_s"] / row["ceiling_gb_per_s"])
    assert timed[0]["ratio_to_eager"] == 1.0
    assert f"hessian_action_              square 32        {EAGER}" in capsys.readouterr().out


def fake_row(provider, ratio, cache="any", **changes):
    row = {
        "kernel": "momentum_", "shape": "square 32", "provider": provider, "cache": cache,
        "us": {"q20": 9.0, "q50": 1234.5, "q80": 11.0}, "ratio_to_eager": ratio, "bound": "memory",
        "gb_per_s": 12.345, "tflop_per_s": 0.01, "share_of_ceiling": 0.5, "peak_bytes": 2**20,
        "batch_size": 1000, "precision": "fp32", "seed": 0, "ceiling_gb_per_s": 24.0,
        "ceiling_tflop_per_s": 0.2, "device": "a CPU", "device_type": "cpu", "threads": 2,
        "torch": "2.13.0", "commit": "0123456789abcdef", "dirty": False,
    }  # fmt: skip
    return row | changes


def test_rows_of_other_devices_are_kept(tmp_path):
    path = tmp_path / "micro.jsonl"
    measure.store(path, [fake_row("cpu", 0.5), fake_row("cpu", 0.5, shape="square 64")])
    measure.store(path, [fake_row("cpu", 0.4, device="another")])
    measure.store(path, [fake_row("cpu", 0.3)])
    assert [(r["device"], r["shape"], r["ratio_to_eager"]) for r in measure.load(path)] == [
        ("a CPU", "square 64", 0.5),
        ("another", "square 32", 0.4),
        ("a CPU", "square 32", 0.3),
    ]


def test_table_of_kernels(monkeypatch):
    rows = [
        fake_row(EAGER, 1.0),
        fake_row("cpu", 0.25),
        fake_row("cpu" + APART, 0.5),
        fake_row(COMPILED, None, us=None, note="skipped"),
        fake_row(EAGER, 1.0, "cold", device="a GPU", device_type="cuda"),
        fake_row("cuda", 0.1, "cold", device="a GPU", device_type="cuda", bound="compute"),
    ]
    monkeypatch.setattr(report, "lines_of", lambda name: rows)
    text = report.micro()
    assert (
        "| momentum_ | square 32 | 1230 | 1.0 | – | – | 1230 | 1.0 | 0.25 | 0.50 | 12.3 GB/s"
        " | 50 % |\n" in text
    )
    assert "10.0 GFLOP/s | 50 % | – | – | – | – | – | – |\n" in text
    assert "cold L2, batch 1000, fp32, seed 0; ceilings 24 GB/s (copy) and 0.20 TFLOP/s" in text
    monkeypatch.setattr(report, "lines_of", lambda name: [])
    assert report.micro().startswith("| kernel |")


# ------------------------------------------------------------------ the guard


def pair(us, of_eager):
    """Rows of the eager reference and of a kernel."""
    return [
        fake_row(provider, None, us={"q20": time})
        for provider, time in ((EAGER, us / of_eager), ("cpu", us))
    ]


def guard(*measurements):
    """What is named when these are measured in turn, and 10 us, half of eager, are committed."""
    rows = iter(pair(*measured) for measured in measurements)
    case = Case(small("momentum_").kernel, "square 32", SMALL)
    return check.slowed(case, check.speeds(pair(10, 0.5)), lambda _: next(rows))


@pytest.mark.parametrize(
    "measured",
    [(10, 0.5), (11.4, 0.57), (30, 0.5), (10, 0.9)],
    ids=["same numbers", "within the limit", "slow machine", "fast eager reference"],
)
def test_guard_is_quiet(measured):
    assert guard(measured) == []


def test_guard_is_quiet_when_a_later_look_clears_a_suspect():
    assert guard((20, 0.9), (18, 0.8), (10, 0.5)) == []


def test_guard_names_what_stays_slower():
    (found,) = guard((20, 0.9), (14, 0.7), (15, 0.75), (12, 0.8), (13, 0.7))
    assert str(found) == (
        "momentum_, square 32, cpu: 1.20 times as long as committed (10.0 us then)"
    )


def test_guard_names_what_has_become_wrong():
    case = Case(small("momentum_").kernel, "square 32", SMALL)
    rows = [fake_row("cpu", None, None, us=None, note="wrong: M[0]: error 1, allowed 0")]
    (found,) = check.slowed(case, check.speeds(pair(10, 0.5)), lambda _: rows)
    assert str(found) == "momentum_, square 32, cpu: wrong: M[0]: error 1, allowed 0"


@backends.needs_native
def test_guard_catches_a_kernel_slowed_on_purpose(kernel_of, tmp_path, capsys):
    """From real rows: of two kernels one is slowed, and that one is named."""
    path = tmp_path / "micro.jsonl"
    asked = ["--kernel", "_", "--shape", "square 32", "--kernel", "loop_, p = 10", *SHORT]
    assert micro.main([*asked, "--json", str(path)]) == 0
    honest = registry.implementation("lbfgs_two_loop_", "cpu").run

    def slow(call):
        time.sleep(0.005)
        honest(call)

    kernel_of("lbfgs_two_loop_", slow)
    rows = measure.load(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if "100" not in row["kernel"]))
    capsys.readouterr()
    assert micro.main([*asked, "--check", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "lbfgs_two_loop_, p = 10, square 32, cpu: " in printed
    assert "1 cases compared, 1 kernels slower or wrong" in printed


def test_guard_without_rows_says_so(tmp_path, capsys):
    assert micro.main(["--check", str(tmp_path / "none.jsonl"), *SHORT]) == 2
    assert "has no rows from" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["factor_ema_", "momentum_", "kron_step_"])
def test_16_bit_numbers_beside_32_bit_state(name):
    """Ours are right on them, and their rows say so."""
    case = dataclasses.replace(small(name), precision="bf16")
    args = case.build(CPU)
    for argument, tensors in args.items():
        if isinstance(tensors, list) and tensors and tensors[0].is_floating_point():
            half = argument in ("X", "W", "b", "dW", "db")
            assert all(t.dtype in ((torch.bfloat16,) if half else (torch.float32, torch.float64))
                       for t in tensors), argument  # fmt: skip
    rows = measure.Bench(CPU, CEILING, seconds=0.0).rows(case)
    assert {row["precision"] for row in rows} == {"bf16"}
    assert all(row["us"] is not None for row in rows if row["provider"] in (EAGER, "cpu"))
