"""The compiled extension is used with the torch it was built for, and with no other."""

import importlib.metadata
import platform
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import kbfgs_ext
from kbfgs_ext import environment
from kbfgs_ext.ops import registry
from tests.helpers import backends

ROOT = Path(__file__).parents[1]
STEPS = """
import sys, warnings, torch
torch.__version__ = "2.99.0+cpu"
import kbfgs_ext
m = torch.nn.Linear(3, 2); opt = kbfgs_ext.KBFGS(m)
def closure():
    opt.zero_grad(); loss = m(torch.ones(4, 3)).square().mean(); loss.backward()
    return loss
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    first = opt.step(closure); last = [opt.step(closure) for _ in range(5)][-1]
assert last < first
print(*[str(w.message) for w in seen], sep="\\n")
print(kbfgs_ext.explain())
print("loaded:", "kbfgs_ext._C" in sys.modules)
"""


@pytest.fixture
def fresh():
    """What is known of the binary is found out anew, here and by the next test."""
    environment._load_native.cache_clear()
    yield
    environment._load_native.cache_clear()


def binary(folder: Path, version: str | None) -> Path:
    """A file that looks built for ``version``."""
    path = folder / "_C.so"
    said = "" if version is None else f"kbfgs_ext built for torch {version}"
    path.write_bytes(b"\x7fELF\0" * 1000 + said.encode() + b"\0.text\0")
    return path


@backends.needs_native
def test_the_binary_says_what_it_was_built_for():
    built = environment.built_for(environment._binary())
    assert built.split("+")[0] == torch.__version__.split("+")[0]


@pytest.mark.parametrize(
    ("built", "here", "reason"),
    [
        ("2.13.0", "2.13.1+cu130", None),
        ("2.13.0+cpu", "2.13.0a0+git1234", None),
        ("2.13.0", "2.11.0", "built for torch 2.13, this is 2.11: rebuild with `pip install "),
        ("2.11.0", "2.13.0+cpu", "built for torch 2.11, this is 2.13: rebuild with `pip install "),
        ("2.1.0", "2.10.0", "built for torch 2.1, this is 2.10: "),
        (None, "2.13.0", "built for an unknown torch, this is 2.13: "),
    ],
)
def test_versions_that_fit(built, here, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", here)
    found = environment._misfit(binary(tmp_path, built))
    assert found is None if reason is None else found.startswith(reason)


def test_a_misfit_is_never_loaded_and_told_once(fresh, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(environment, "_binary", lambda: binary(tmp_path, "1.0.0"))
    monkeypatch.setattr(environment.importlib, "import_module", lambda name: pytest.fail(name))
    for _ in range(3):
        assert environment.native_missing().startswith(
            "the compiled extension is not used: built for torch 1.0, this is "
        )
        assert environment.cuda_missing() == environment.native_missing()
    assert len(recwarn) == 1 and "built for torch 1.0" in str(recwarn[0].message)


def test_one_that_does_not_load_is_told_once(fresh, tmp_path, monkeypatch, recwarn):
    def fail(name: str) -> types.ModuleType:
        raise ImportError("libc10_cuda.so: cannot open shared object file")

    monkeypatch.setattr(environment, "_binary", lambda: binary(tmp_path, torch.__version__))
    monkeypatch.setattr(environment.importlib, "import_module", fail)
    for _ in range(2):
        assert "does not load: libc10_cuda.so" in environment.native_missing()
    assert len(recwarn) == 1


def test_one_that_is_not_there_is_no_reason_to_warn(fresh, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(environment, "_binary", lambda: None)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert "is not built" in environment.native_missing()
    assert not recwarn
    environment._load_native.cache_clear()
    (tmp_path / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    assert "built for another Python (_C.cpython-39-" in environment.native_missing()
    assert len(recwarn) == 1


def test_disabled_on_purpose_is_silent(fresh, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(environment, "_binary", lambda: binary(tmp_path, "1.0.0"))
    monkeypatch.setenv("KBFGS_DISABLE_NATIVE", "1")
    assert environment.native_missing() == "KBFGS_DISABLE_NATIVE=1"
    assert not recwarn


@backends.needs_native
def test_the_optimizer_goes_on_without_it(tmp_path):
    """A whole process under a torch of another version: one warning, steps, an explanation."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        env={"PATH": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    built = ".".join(environment.built_for(environment._binary()).split(".")[:2])
    said = f"built for torch {built}, this is 2.99: rebuild with"
    first, *rest = done.stdout.splitlines()
    assert said in first and not any("is not used" in line for line in rest[:1])
    assert f"compiled extension: missing, the compiled extension is not used: {said}" in done.stdout
    assert "bfgs_update/bfgs_update_: reference; not " in done.stdout
    assert rest[-1] == "loaded: False"


def test_explain_says_which_versions_are_in_use(monkeypatch):
    """Of a report the first thing that one asks for."""
    found = importlib.metadata.version
    monkeypatch.setattr(environment, "_triton_found", lambda: True)
    known = {"triton": "3.99.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: known.get(name) or found(name))
    wanted = f"kbfgs_ext {kbfgs_ext.__version__}, torch {torch.__version__}"
    for said in (kbfgs_ext.explain("cpu"), registry.explain_step({})):
        assert wanted in said and "Triton 3.99.0" in said and platform.python_version() in said
    monkeypatch.setattr(environment, "_triton_found", lambda: False)
    assert "Triton not installed" in kbfgs_ext.explain("cpu")


def test_triton_of_a_distribution_with_another_name(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment, "_triton_found", lambda: True)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.98"))
    assert "Triton 3.98" in environment.versions()
