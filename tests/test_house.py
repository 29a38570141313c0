"""The house: one name per family everywhere, files of readable size, documents that run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kbfgs_ext
from kbfgs_ext.ops import library, registry
from tests.helpers import traffic

ROOT = Path(__file__).parents[1]
LONGEST_FILE = 400  # lines


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_family_has_one_name_everywhere(family):
    for path in (
        f"csrc/{family}/{family}.h",
        f"kbfgs_ext/ops/{family}/README.md",
        f"kbfgs_ext/ops/{family}/reference.py",
        f"kbfgs_ext/ops/{family}/native.py",
        f"kbfgs_ext/ops/{family}/cuda.py",
        f"kbfgs_ext/ops/{family}/triton.py",
        f"kbfgs_ext/ops/{family}/api.py",
        f"benchmarks/micro/{family}.py",
    ):
        assert (ROOT / path).is_file(), path
    assert list((ROOT / f"csrc/{family}").glob("*_cpu.cpp"))
    assert list((ROOT / f"csrc/{family}").glob("*_cuda.cu"))
    assert list((ROOT / "tests/ops").glob(f"test_{family}*.py")), f"tests/ops/test_{family}*.py"


def test_every_schema_has_a_reference_and_a_face():
    names = [schema.split("(", 1)[0] for schema in library.SCHEMAS]
    assert sorted(names) == sorted(registry.ops())
    for name in names:
        assert hasattr(torch.ops.kbfgs_ext, name)
        assert registry.implementation(name, "reference").run.__name__ == name
        for backend in ("cpu", "cuda", "triton"):
            assert registry.implementation(name, backend).family == registry.ops()[name]


def test_explain_of_one_call_tries_it():
    """On copies: what depends on the call is said, and nothing is written."""
    H, y = torch.eye(3), torch.ones(3)
    args = ([H], [torch.zeros(4, dtype=torch.int64)], [y], [y.clone()], [], [y.clone()], None)
    said = registry.explain(op="bfgs_update_", args=args)
    assert said.startswith("bfgs_update/bfgs_update_: cpu; not cuda: ")
    half = ([H.half()], args[1], [y.half()], [y.half()], [], [y.half()], None)
    said = registry.explain(op="bfgs_update_", args=half)
    assert "not cpu: the cpu kernels take float32 and float64, not Half" in said
    assert torch.equal(H, torch.eye(3))
    assert registry.explain("cpu", "momentum_").count("kron_precondition/") == 1
    with pytest.raises(ValueError, match="op must be one of .*got 'momentum'"):
        registry.explain(op="momentum")
    with pytest.raises(ValueError, match="op must be given"):
        registry.explain(args=args)


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

    def decline(*args):
        raise registry.Unsupported("not today")

    def fail(*args):
        raise ZeroDivisionError("a bug")

    n = 3
    args = (
        [torch.eye(n)], [torch.zeros(4, dtype=torch.int64)], [torch.ones(n)], [torch.ones(n)], [],
        [torch.ones(n)],
    )  # fmt: skip
    table = registry._TABLE["bfgs_update_"]
    for run, error in ((decline, None), (fail, ZeroDivisionError)):
        fake = registry.Implementation("bfgs_update_", "bfgs_update", "cpu", run, lambda: None)
        monkeypatch.setitem(table, "cpu", fake)
        if error is None:
            torch.ops.kbfgs_ext.bfgs_update_(*args)
            assert int(args[1][0][0]) == 1
        else:
            with pytest.raises(error):
                torch.ops.kbfgs_ext.bfgs_update_(*args)
        with pytest.raises(registry.Unsupported if error is None else error):
            torch.ops.kbfgs_ext.bfgs_update_(*args, backend="cpu")
