"""setup.py finds the CUDA toolkit behind whatever is called nvcc, or says why it leaves it out."""

import importlib.util
import sysconfig
from pathlib import Path

import pytest
from setuptools import Distribution

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """setup.py as a module, where the PATH is tmp_path/bin and torch a CUDA build."""
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CUDA_HOME", "CUDA_PATH", "KBFGS_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(module, "USUAL_TOOLKIT", tmp_path / "nothing")
    monkeypatch.setattr(module.torch.version, "cuda", "13.0")
    monkeypatch.setattr(module.cpp_extension, "CUDA_HOME", str(tmp_path))  # torch's guess
    return module


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def toolkit(tmp_path):
    """A folder that looks like one; its nvcc says where it is, as the real one does."""
    home = tmp_path / "toolkit"
    executable(home / "bin/nvcc", 'echo "#$ TOP=${0%/*}/.." >&2')
    (home / "include").mkdir()
    (home / "include/cuda_runtime_api.h").touch()
    return home


def test_a_wrapper_outside_the_toolkit(setup, toolkit, tmp_path):
    executable(tmp_path / "bin/nvcc", f'exec {toolkit}/bin/nvcc "$@"')
    assert setup.why_no_cuda() is None
    extension = setup.extension()
    assert str(toolkit / "include") in extension.include_dirs
    assert setup.cpp_extension._join_cuda_home("bin", "nvcc") == str(toolkit / "bin/nvcc")


def test_a_link_into_the_toolkit(setup, toolkit, tmp_path):
    (tmp_path / "bin/nvcc").symlink_to(toolkit / "bin/nvcc")
    assert setup.toolkit() == toolkit


def test_no_nvcc_on_the_path_but_the_usual_folder(setup, toolkit, monkeypatch):
    assert setup.toolkit() is None
    assert setup.why_no_cuda() == "nvcc was not found (set CUDA_HOME)"
    monkeypatch.setattr(setup, "USUAL_TOOLKIT", toolkit)
    assert setup.toolkit() == toolkit


def test_the_variable_comes_first(setup, toolkit, tmp_path, monkeypatch):
    executable(tmp_path / "bin/nvcc", "exit 1")
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert setup.toolkit() == toolkit
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    assert "CUDA_HOME" in setup.why_no_cuda()


def test_a_toolkit_without_headers_is_left_out_with_the_reason(setup, toolkit, tmp_path, capsys):
    (toolkit / "include/cuda_runtime_api.h").unlink()
    executable(tmp_path / "bin/nvcc", f'exec {toolkit}/bin/nvcc "$@"')
    assert "cuda_runtime_api.h" in setup.why_no_cuda()
    extension = setup.extension()
    assert not [source for source in extension.sources if source.endswith(".cu")]
    assert "CUDA kernels left out: " in capsys.readouterr().out


def test_a_binary_of_this_python_alone_does_not_stay(setup, monkeypatch, tmp_path):
    """It would be found before the one that was just built."""
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "kbfgs_ext" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    old.parent.mkdir()
    old.touch()
    monkeypatch.setattr(setup.cpp_extension.BuildExtension, "run", lambda self: None)
    setup.BuildExtension(Distribution()).run()
    assert old.exists() != setup.LIMITED


def test_cuda_left_out_on_purpose(setup, toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert setup.why_no_cuda() is None
    monkeypatch.setenv("KBFGS_CUDA", "0")
    assert setup.why_no_cuda() == "KBFGS_CUDA=0"
