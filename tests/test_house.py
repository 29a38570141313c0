"""The house: one name per family everywhere, files of readable size, documents that run."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kbfgs_ext
from kbfgs_ext import environment, ops
from kbfgs_ext.ops import registry
from tests.helpers import backends, calls, traffic

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kbfgs_ext"
LONGEST_FILE = 400  # lines


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_family_has_one_name_everywhere(family):
    for path in (
        f"csrc/{family}/{family}.h",
        f"csrc/{family}/bindings_cpu.cpp",
        f"csrc/{family}/bindings_cuda.cpp",
        f"kbfgs_ext/ops/{family}/README.md",
        f"kbfgs_ext/ops/{family}/reference.py",
        f"kbfgs_ext/ops/{family}/triton.py",
        f"kbfgs_ext/ops/{family}/api.py",
        f"kbfgs_ext/bench/{family}.py",
    ):
        assert (ROOT / path).is_file(), path
    assert list((ROOT / f"csrc/{family}").glob("*_cpu.cpp"))
    assert list((ROOT / f"csrc/{family}").glob("*_cuda.cu"))
    assert list((ROOT / "tests/ops").glob(f"test_{family}*.py")), f"tests/ops/test_{family}*.py"


@pytest.mark.parametrize("op", sorted(registry.ops()))
def test_an_op_is_declared_once(op):
    """Its public function's signature is the schema, and no backend knows of another argument."""
    declared = inspect.signature(getattr(ops, op)).parameters
    schema = getattr(torch.ops.kbfgs_ext, op).default._schema.arguments
    assert [argument.name for argument in schema] == list(declared)
    assert list(declared)[-1] == "backend"
    for argument in schema:
        default = declared[argument.name].default
        if default is inspect.Parameter.empty:
            assert not argument.has_default_value(), argument.name
        else:
            assert argument.default_value == default, argument.name
    python = ["reference"]
    if importlib.util.find_spec("triton"):
        python.append("triton")
    for backend in python:
        module = importlib.import_module(f"kbfgs_ext.ops.{registry.ops()[op]}.{backend}")
        function = inspect.signature(getattr(module, op)).parameters
        assert set(function) <= set(calls.names(op)), backend
        assert all(p.default is inspect.Parameter.empty for p in function.values()), backend


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_bindings_look_up_what_the_family_declares(family):
    known = {
        name for op, own in registry.ops().items() if own == family for name in calls.names(op)
    }
    for path in (ROOT / "csrc" / family).glob("*"):
        if path.suffix in (".cpp", ".h"):
            looked_up = re.findall(r'\b(?:args|call)\.\w+\(\s*"(\w+)"', path.read_text())
            assert set(looked_up) <= known, path.name


def test_csrc_sees_torch_through_one_header():
    """Which is what makes a binary serve every torch."""
    stable = ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/")
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            seen = re.findall(r"#include <((?:torch|ATen|c10|pybind11)/[^>]+)>", path.read_text())
            assert not seen or path.name == "stable.h", path.name
            assert all(header.startswith(stable) for header in seen)


@backends.needs_native
def test_bindings_name_what_does_not_fit():
    pair_ema = environment.native().pair_ema_cpu
    lists = {name: [torch.ones(3)] for name in ("s", "y", "g_bar", "g_bar_next")}
    with pytest.raises(ValueError, match="the call has no argument h_change"):
        pair_ema(lists | {"decay": 0.9, "ok": None})
    lists |= {"h_change": [torch.ones(3)]}
    for wrong, words in (
        ({"s": torch.ones(3)}, "s must be a list of tensors"),
        ({"y": [1.0]}, "y must be a list of tensors"),
        ({"decay": "much"}, "decay must be a number"),
        ({"ok": 1.0}, "ok must be a tensor"),
        ({"ok": object()}, "ok is of a type that no op takes"),
    ):
        with pytest.raises(ValueError, match=words):
            pair_ema(lists | {"decay": 0.9, "ok": None} | wrong)


def test_explain_of_one_call_tries_it():
    """On copies: what depends on the call is said, and nothing is written."""
    H, y = torch.eye(3), torch.ones(3)
    counts = torch.zeros(4, dtype=torch.int64)
    args = {"H": [H], "counts": [counts], "s": [y], "y": [y.clone()], "Hy": [], "c": [y.clone()]}
    said = registry.explain(op="bfgs_update_", args=args)
    assert said.startswith("bfgs_update/bfgs_update_: cpu; not cuda: ")
    half = calls.apply(args, lambda t: t.half() if t.is_floating_point() else t)
    said = registry.explain(op="bfgs_update_", args=half | {"ok": None})
    assert "not cpu: the cpu kernels take float32 and float64, not float16" in said
    assert torch.equal(H, torch.eye(3))
    assert registry.explain("cpu", "momentum_").count("kron_precondition/") == 1
    with pytest.raises(ValueError, match="op must be one of .*got 'momentum'"):
        registry.explain(op="momentum")
    with pytest.raises(ValueError, match="op must be given"):
        registry.explain(args=args)
    for unfit, word in ((args | {"h": []}, "h"), ({"H": [H]}, "Hy, c, counts, s, y")):
        with pytest.raises(ValueError, match=f"args do not fit bfgs_update_: {word}"):
            registry.explain(op="bfgs_update_", args=unfit)


def tracked(*patterns: str) -> list[Path]:
    if not (ROOT / ".git").exists():  # a source distribution
        pytest.skip("needs git's list of files: a checkout")
    listed = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / line for line in listed.stdout.splitlines()]


def test_files_are_short():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
        if (lines := len(path.read_text().splitlines())) > LONGEST_FILE
    }
    assert not long


def test_the_version_is_the_same_everywhere():
    version = kbfgs_ext.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[1] == version


def test_import_without_extension_and_without_triton(tmp_path):
    """The package works on the reference backend alone, and explain() says what is missing."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kbfgs_ext\n"
        "m = torch.nn.Linear(3, 2); opt = kbfgs_ext.KBFGS(m)\n"
        "def closure():\n"
        "    opt.zero_grad(); loss = m(torch.ones(4, 3)).square().mean(); loss.backward()\n"
        "    return loss\n"
        "opt.step(closure); opt.step(closure)\n"
        "print(kbfgs_ext.explain())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "", "KBFGS_DISABLE_NATIVE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert "compiled extension: missing, KBFGS_DISABLE_NATIVE=1" in done.stdout
    assert "bfgs_update/bfgs_update_: reference" in done.stdout


def test_explain_names_every_op_and_its_backend(monkeypatch):
    report = registry.explain("cpu")
    for op, family in registry.ops().items():
        assert re.search(rf"{family}/{op}: cpu", report), op
    assert "not cuda: " in report
    monkeypatch.setenv("KBFGS_BACKEND", "reference")
    assert "not cpu: KBFGS_BACKEND=reference" in registry.explain("cpu")
    monkeypatch.setenv("KBFGS_BACKEND", "fast")
    with pytest.raises(ValueError, match="KBFGS_BACKEND must be .*got 'fast'"):
        registry.explain("cpu")


def test_traffic_table_is_the_reckoned_one():
    assert traffic.table() in (ROOT / "kbfgs_ext/ops/README.md").read_text()


def snippets() -> list[tuple[str, str]]:
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if path.exists():
            blocks = re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.S)
            found += [(f"{path.name}-{i}", block) for i, block in enumerate(blocks)]
    return found


@pytest.mark.parametrize(("name", "code"), snippets(), ids=[name for name, _ in snippets()])
def test_snippet_runs(name, code):
    torch.manual_seed(0)
    exec(compile(code, name, "exec"), {})


def test_only_unsupported_falls_through(monkeypatch):
    """A backend that declines is passed over; one that fails is heard."""

    def decline(call):
        raise registry.Unsupported("not today")

    def fail(call):
        raise ZeroDivisionError("a bug")

    n = 3
    args = (
        [torch.eye(n)], [torch.zeros(4, dtype=torch.int64)], [torch.ones(n)], [torch.ones(n)], [],
        [torch.ones(n)],
    )  # fmt: skip
    table = registry._TABLE["bfgs_update_"]
    for run, error in ((decline, None), (fail, ZeroDivisionError)):
        fake = registry.Implementation("bfgs_update_", "cpu", run, lambda: None)
        monkeypatch.setitem(table, "cpu", fake)
        if error is None:
            torch.ops.kbfgs_ext.bfgs_update_(*args)
            assert int(args[1][0][0]) == 1
        else:
            with pytest.raises(error):
                torch.ops.kbfgs_ext.bfgs_update_(*args)
        with pytest.raises(registry.Unsupported if error is None else error):
            torch.ops.kbfgs_ext.bfgs_update_(*args, backend="cpu")


FACTORIES = {
    "arange", "asarray", "as_tensor", "empty", "empty_strided", "eye", "from_numpy", "frombuffer",
    "full", "linspace", "ones", "rand", "randint", "randn", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


def test_whatever_is_made_has_a_named_device():
    """What `torch.set_default_device` says is of the user's tensors, not of ours."""
    nowhere = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and (node.func.attr in FACTORIES or (node.func.attr == "Generator" and not node.args))
        and "device" not in {keyword.arg for keyword in node.keywords}
    ]
    assert not nowhere, "\n".join(nowhere)
