"""Every layout that CIFAR-10 comes in gives the same tensors; what is not one is refused in a sentence."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import data
from pipeline.data import CIFAR10

Half = tuple[np.ndarray, np.ndarray]  # uint8 [N, 3, 32, 32], labels in ascending order
Halves = dict[str, Half]


@pytest.fixture
def rng() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def halves(rng: np.random.Generator) -> Halves:
    labels = {"train": np.arange(10).repeat(2), "test": np.arange(10)}
    return {half: (rng.integers(0, 256, (len(y), 3, 32, 32), np.uint8), y) for half, y in labels.items()}


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "png")
    return buffer.getvalue()


def pictures(half: Half) -> dict[str, bytes]:
    """class/NNNN.png of every image."""
    return {f"{CIFAR10[y]}/{i:04}.png": png(x) for i, (x, y) in enumerate(zip(*half, strict=True))}


def all_pictures(halves: Halves) -> dict[str, bytes]:
    return {f"{name}/{file}": blob for name, half in halves.items() for file, blob in pictures(half).items()}


def python_batches(halves: Halves) -> dict[str, bytes]:
    (x, y), test = halves["train"], halves["test"]
    parts = {"data_batch_1": (x[:8], y[:8]), "data_batch_2": (x[8:], y[8:]), "test_batch": test}
    files = {
        f"cifar-10-batches-py/{name}": pickle.dumps({b"data": x.reshape(len(x), -1), b"labels": y.tolist()}, 4)
        for name, (x, y) in parts.items()
    }
    return files | {"cifar-10-batches-py/batches.meta": pickle.dumps({b"label_names": CIFAR10})}


def binary_batches(halves: Halves) -> dict[str, bytes]:
    (x, y), test = halves["train"], halves["test"]
    parts = {"data_batch_1": (x[:8], y[:8]), "data_batch_2": (x[8:], y[8:]), "test_batch": test}
    return {
        f"cifar-10-batches-bin/{name}.bin": np.hstack([y[:, None].astype(np.uint8), x.reshape(len(x), -1)]).tobytes()
        for name, (x, y) in parts.items()
    }


def folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, blob in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(blob)
    return path


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, blob in files.items():
            archive.writestr(name, blob)
    return path


def tarred(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, blob in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(blob)
            archive.addfile(member, io.BytesIO(blob))
    return path


def two_zips(path: Path, halves: Halves) -> Path:
    for name, half in halves.items():
        zipped(path / f"{name}.zip", pictures(half))
    return path


LAYOUTS: dict[str, Callable[[Path, Halves], Path]] = {
    "train and test folders": lambda path, halves: folder(path, all_pictures(halves)),
    "train.zip and test.zip": two_zips,
    "one zip": lambda path, halves: zipped(path / "a.zip", all_pictures(halves)),
    "one zip with a folder around and clutter": lambda path, halves: zipped(
        path / "a.zip",
        {f"cifar10/{name}": blob for name, blob in all_pictures(halves).items()}
        | {"README.txt": b"", "__MACOSX/cifar10/train/cat/._0000.png": b"", "cifar10/train/cat/.DS_Store": b""},
    ),
    "python archive": lambda path, halves: tarred(path / "cifar-10-python.tar.gz", python_batches(halves)),
    "folder of the python archive": lambda path, halves: LAYOUTS["python archive"](path, halves).parent,
    "around the python batches": lambda path, halves: folder(path, python_batches(halves)),
    "the python batches": lambda path, halves: folder(path, python_batches(halves)) / "cifar-10-batches-py",
    "the python archive beside its contents": lambda path, halves: folder(
        LAYOUTS["folder of the python archive"](path, halves), python_batches(halves)
    ),
    "zips beside their contents": lambda path, halves: folder(two_zips(path, halves), all_pictures(halves)),
    "binary archive": lambda path, halves: tarred(path / "cifar-10-binary.tar.gz", binary_batches(halves)),
    "the binary batches": lambda path, halves: folder(path, binary_batches(halves)) / "cifar-10-batches-bin",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, tmp_path: Path, halves: Halves) -> None:
    path = LAYOUTS[layout](tmp_path, halves)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    found = data.load("cifar10", path)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    assert found.classes == CIFAR10
    assert found.image_shape == (3, 32, 32)
    for split, (images, labels) in zip((found.train, found.test), halves.values(), strict=True):
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)


def test_a_folder_of_other_classes_in_grey(tmp_path: Path, rng: np.random.Generator) -> None:
    images = rng.integers(0, 256, (4, 5, 6), np.uint8)
    names = ["train/on/a.png", "train/off/b.png", "test/on/c.png", "test/off/d.png"]
    for name, image in zip(names, images, strict=True):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / name)
    found = data.load("folder", tmp_path)
    assert found.classes == ("off", "on")
    assert found.image_shape == (1, 5, 6)
    np.testing.assert_array_equal(found.train.images[:, 0], images[[1, 0]])
    assert found.train.labels.tolist() == found.test.labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="not CIFAR-10's 10 classes"):
        data.load("cifar10", tmp_path)


class Malicious:
    """Makes a folder when unpickled carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.mkdir, (self.path,)


def test_a_malicious_pickle_is_not_run(tmp_path: Path, halves: Halves) -> None:
    pwned = tmp_path / "pwned"
    files = python_batches(halves) | {"cifar-10-batches-py/data_batch_2": pickle.dumps(Malicious(pwned), 4)}
    with pytest.raises(ValueError, match="data_batch_2: not a CIFAR-10 batch: its pickle asks for pathlib"):
        data.load("cifar10", tarred(tmp_path / "cifar-10-python.tar.gz", files))
    assert not pwned.exists()


@pytest.mark.parametrize("blob", [b"", b"\x80\x04.", pickle.dumps({b"data": 3, b"labels": []}), pickle.dumps([1])])
@pytest.mark.parametrize("name", ["cifar-10-batches-py/test_batch", "cifar-10-batches-bin/test_batch.bin"])
def test_broken_batches(name: str, blob: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"test_batch(\.bin)?: not a CIFAR-10 batch|both a training and a test half"):
        data.load("cifar10", folder(tmp_path, {name: blob}))


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"train/cat/0.png": "good"}, "found train; give a folder or zip with train/ and test/"),
        ({"test/cat/0.png": "good"}, "found test;"),
        ({"cat/0.png": "good", "dog/0.png": "good"}, "found neither half"),
        ({"train/cat/0.png": "good", "test/cat/0.png": "wide"}, "test/cat/0.png: .* all must have"),
        ({"train/cat/0.png": "good", "train/cat/1.png": "wide", "test/cat/0.png": "good"}, "1.png: .* all must have"),
        ({"train/cat/0.png": "good", "test/dog/0.png": "good"}, "class 'dog'"),
        ({"train/cat/0.png": "good", "train/cat/1.png": "text", "test/cat/0.png": "good"}, "1.png: not an image"),
        ({"train/cat/0.png": "text", "test/cat/0.png": "good"}, "0.png: not an image"),
    ],
)
def test_refused_folders(files: dict[str, str], sentence: str, tmp_path: Path) -> None:
    blobs = {"good": png(np.zeros((3, 4, 4), np.uint8)), "wide": png(np.zeros((3, 4, 5), np.uint8)), "text": b"hello"}
    folder(tmp_path, {name: blobs[kind] for name, kind in files.items()})
    with pytest.raises(ValueError, match=sentence):
        data.load("folder", tmp_path)


def test_refused_names_and_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data set 'mnist': choose one of digits, cifar10, folder"):
        data.load("mnist")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'cifar10' needs its files: with --data PATH"):
        data.load("cifar10")
    with pytest.raises(ValueError, match="neither a folder nor a zip or tar archive"):
        data.load("cifar10", tmp_path / "missing")


def test_digits() -> None:
    digits = data.load("digits")
    assert digits.image_shape == (1, 8, 8)
    assert len(digits.classes) == 10
    assert len(digits.train.labels) == 1347
    assert len(digits.test.labels) == 450
    assert digits.test.labels.bincount().min() >= 43  # stratified: 1797 / 10 / 4 = 45
    assert torch.equal(data.load("digits").test.images, digits.test.images)
    assert not torch.equal(data.load("digits", seed=1).test.images, digits.test.images)


def test_to_float() -> None:
    assert data.to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([-1, -0.6, 1])


@pytest.mark.parametrize("pad", [0, 1, 3])
def test_crop_flip_shifts_and_mirrors(pad: int, rng: np.random.Generator) -> None:
    images = torch.from_numpy(rng.integers(1, 256, (200, 2, 4, 5), np.uint8))
    torch.manual_seed(int(rng.integers(2**31)))
    seen = set()
    padded = np.pad(images, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    for image, source in zip(data.crop_flip(images, pad).numpy(), padded, strict=True):
        candidates = {
            (top, left, step): source[:, top : top + 4, left : left + 5][:, :, ::step]
            for top in range(2 * pad + 1)
            for left in range(2 * pad + 1)
            for step in (1, -1)
        }
        matches = [key for key, candidate in candidates.items() if np.array_equal(candidate, image)]
        assert matches
        seen.add(matches[0])
    assert len(seen) > (1 if pad == 0 else 8)
