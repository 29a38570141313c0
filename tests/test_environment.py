"""The compiled extension is used with every torch that it works with, and with no other."""

import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
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
torch.__version__ = "2.10.1+cpu"
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
    """A file that looks like one that needs torch ``version``."""
    path = folder / "_C.so"
    said = "" if version is None else f"kbfgs_ext needs torch {version}"
    path.write_bytes(b"\x7fELF\0" * 1000 + said.encode() + b"\0.text\0")
    return path


@backends.needs_native
def test_the_binary_says_what_it_needs():
    needed = environment.needs_torch(environment._binary())
    asked = (ROOT / "pyproject.toml").read_text()
    assert f'dependencies = ["torch>={needed}"' in asked


@backends.needs_native
def test_the_binary_is_of_stable_interfaces_alone():
    """Nothing of torch's C++, whose layout changes, nor of what a Python version has alone."""
    path = environment._binary()
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("a free-threaded Python has no limited API")
    assert ".abi3." in path.name
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm")
    said = subprocess.run([nm, "-D", "-u", str(path)], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in said.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [n for n in names if re.search(r"_Z.*(2at|3c10|5torch)|THP|_PyObject|pybind", n)]


@pytest.mark.parametrize(
    ("needed", "here", "reason"),
    [
        ("2.11", "2.11.0", None),
        ("2.11", "2.13.1+cu130", None),
        ("2.11", "2.13.0a0+git1234", None),
        ("2.11", "3.0.0", None),
        ("2.11", "2.10.2+cpu", "it needs torch 2.11 or newer, this is 2.10.2+cpu"),
        ("2.11", "2.9.0", "it needs torch 2.11 or newer, this is 2.9.0"),
        (None, "2.13.0", "_C.so is of an older kbfgs_ext: delete it and rebuild with `pip install"),
    ],
)
def test_versions_that_fit(needed, here, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", here)
    found = environment._misfit(binary(tmp_path, needed))
    assert found is None if reason is None else found.startswith(reason)


def test_a_misfit_is_never_loaded_and_told_once(fresh, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(environment, "_binary", lambda: binary(tmp_path, "99.0"))
    monkeypatch.setattr(environment.importlib, "import_module", lambda name: pytest.fail(name))
    for _ in range(3):
        assert environment.native_missing().startswith(
            "the compiled extension is not used: it needs torch 99.0 or newer, this is "
        )
        assert environment.cuda_missing() == environment.native_missing()
    assert len(recwarn) == 1 and "needs torch 99.0" in str(recwarn[0].message)


def test_one_that_does_not_load_is_told_once(fresh, tmp_path, monkeypatch, recwarn):
    def fail(name: str) -> types.ModuleType:
        raise ImportError("libc10_cuda.so: cannot open shared object file")

    monkeypatch.setattr(environment, "_binary", lambda: binary(tmp_path, "2.11"))
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
    monkeypatch.setattr(environment, "_binary", lambda: binary(tmp_path, "99.0"))
    monkeypatch.setenv("KBFGS_DISABLE_NATIVE", "1")
    assert environment.native_missing() == "KBFGS_DISABLE_NATIVE=1"
    assert not recwarn


@backends.needs_native
def test_the_optimizer_goes_on_without_it(tmp_path):
    """A whole process under a torch that is too old: one warning, steps, an explanation."""
    where = str(Path(kbfgs_ext.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        env={"PATH": "", "PYTHONPATH": where, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = "it needs torch 2.11 or newer, this is 2.10.1+cpu"
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
