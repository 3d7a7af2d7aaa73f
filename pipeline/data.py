"""Data sets as uint8 tensors in memory: bundled digits, CIFAR-10 in its usual layouts, any folder of class folders.

Files are read where they lie, archives included, and nothing is written. Pixels become floats per batch (`to_float`).
"""

from __future__ import annotations

import io
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from torch import Tensor

Name = Literal["digits", "cifar10", "folder"]
Reader = Callable[[], bytes]
Picture = tuple[str, str, Reader]  # class, path, reader

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_LAYOUT = (
    "give a folder or zip with train/ and test/ (or train.zip and test.zip), each with one folder of images per class, "
    "or CIFAR-10's python or binary archive"
)


@dataclass(frozen=True)
class Split:
    """images: uint8 [N, C, H, W]. labels: int64 [N], positions in `Dataset.classes`."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """A data set with its training and its test half."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        c, h, w = self.train.images.shape[1:]
        return c, h, w


def to_float(images: Tensor) -> Tensor:
    """What a network takes: uint8 0..255 -> float32 -1..1, for every data set, so that a device needs no statistics."""
    return images.float() / 127.5 - 1


def crop_flip(images: Tensor, pad: int) -> Tensor:
    """Each image shifted by up to ``pad`` pixels (black comes in) and mirrored with chance 1/2, from torch's generator.

    images: [N, C, H, W] -> the same shape.
    """
    n, _, h, w = images.shape
    top, left = torch.randint(0, 2 * pad + 1, (2, n, 1))
    rows, columns = top + torch.arange(h), left + torch.arange(w)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns, columns.flip(1))
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    picked = padded[torch.arange(n).view(-1, 1, 1), :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


def load(name: Name, path: Path | None = None, seed: int = 0) -> Dataset:
    """Read a data set into memory.

    Args:
        name: 'digits' (scikit-learn's, 8x8, 1 channel), 'cifar10', or 'folder' (any classes, all images of one size).
        path: where 'cifar10' or 'folder' lies, a folder or an archive.
        seed: of the stratified split of the digits, a quarter of which is the test half.

    Raises:
        ValueError: no such data set, no path where one is needed, or files that are not laid out as expected.
    """
    if name == "digits":
        return _digits(seed)
    if name not in get_args(Name):
        raise ValueError(f"there is no data set '{name}': choose one of {', '.join(get_args(Name))}")
    if path is None:
        raise ValueError(f"the data set '{name}' needs its files: with --data PATH {_LAYOUT}")
    dataset = _read(name, Path(path))
    if name == "cifar10" and (dataset.classes != CIFAR10 or dataset.image_shape != (3, 32, 32)):
        raise ValueError(f"{path}: not CIFAR-10's 10 classes of 3x32x32 images; read other images with name = 'folder'")
    return dataset


def _digits(seed: int) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=seed)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, parts)
    return Dataset("digits", tuple("0123456789"), Split(train_x, train_y), Split(test_x, test_y))


def _files(path: Path, stack: ExitStack) -> Iterator[tuple[str, Reader]]:
    """(path inside, reader) of every file of a folder or archive; archives at the top of a folder are opened too."""
    if path.is_dir():
        for file in sorted(f for depth in ("*", "*/*", "*/*/*") for f in path.glob(depth) if f.is_file()):
            if file.parent == path and re.fullmatch(r"(train|test)\.zip|cifar-10-.*\.tar\.gz", file.name):
                yield from ((f"{file.stem}/{inner}", read) for inner, read in _files(file, stack))
            else:
                yield file.relative_to(path).as_posix(), file.read_bytes
    elif path.is_file() and zipfile.is_zipfile(path):
        archive = stack.enter_context(zipfile.ZipFile(path))
        yield from ((f.filename, partial(archive.read, f)) for f in archive.infolist() if not f.is_dir())
    elif path.is_file() and tarfile.is_tarfile(path):
        tar = stack.enter_context(tarfile.open(path))  # noqa: SIM115
        opened = ((f.name, tar.extractfile(f)) for f in tar.getmembers())
        yield from ((name, inner.read) for name, inner in opened if inner is not None)  # None: a folder
    else:
        raise ValueError(f"{path}: neither a folder nor a zip or tar archive; {_LAYOUT}")


def _read(name: str, path: Path) -> Dataset:
    # keyed by name, so that an archive beside what was extracted from it counts once
    batches: dict[str, dict[str, Split]] = {"data": {}, "test": {}}
    pictures: dict[str, dict[tuple[str, str], Picture]] = {"train": {}, "test": {}}
    with ExitStack() as stack:
        for file, read in _files(path, stack):
            *_, half, label, base = ("", "", *PurePosixPath(file).parts)
            if batch := re.fullmatch(r"(data|test)_batch(_\d|)(\.bin)?", base):
                batches[batch[1]][batch[2]] = _batch(file, read())
            elif half in pictures and re.fullmatch(r"[^.].*\.(png|jpe?g|bmp)", base, re.IGNORECASE):
                pictures[half][label, base] = (label, file, read)
        if all(batches.values()):
            return Dataset(name, CIFAR10, _joined(batches["data"]), _joined(batches["test"]))
        if not all(pictures.values()):
            found = " and ".join(half for half, files in pictures.items() if files) or "neither half"
            raise ValueError(f"{path}: both a training and a test half are needed, found {found}; {_LAYOUT}")
        classes = tuple(sorted({label for label, _ in pictures["train"]}))
        train, test = ([files[key] for key in sorted(files)] for files in pictures.values())
        like = _opened(*train[0][1:])
        return Dataset(name, classes, _decoded(train, classes, like), _decoded(test, classes, like))


def _joined(batches: dict[str, Split]) -> Split:
    splits = [batches[number] for number in sorted(batches)]
    return Split(torch.cat([s.images for s in splits]), torch.cat([s.labels for s in splits]))


class _Unpickler(pickle.Unpickler):
    """Loads containers, bytes and NumPy arrays, all that CIFAR-10's python version holds, and nothing that runs."""

    _reconstruct = np.empty(0).__reduce__()[0]
    _allowed = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise ValueError(f"its pickle asks for {module}.{name}, which no CIFAR-10 file does: do not trust it")
        return self._allowed[module, name]


def _batch(file: str, blob: bytes) -> Split:
    """One file of CIFAR-10: a pickled dict, or records of one label byte and 3 x 32 x 32 pixels (``.bin``)."""
    try:
        if file.endswith(".bin"):
            records = np.frombuffer(blob, np.uint8).reshape(-1, 3073)
            pixels, labels = records[:, 1:].copy(), records[:, 0]
        else:
            batch = _Unpickler(io.BytesIO(blob), encoding="bytes").load()
            pixels, labels = batch[b"data"], batch[b"labels"]
        return Split(torch.from_numpy(pixels).reshape(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.int64))
    except (pickle.UnpicklingError, ValueError, TypeError, LookupError, AttributeError, EOFError) as error:
        raise ValueError(f"{file}: not a CIFAR-10 batch: {error}") from None


def _opened(file: str, read: Reader) -> Image.Image:
    try:
        return Image.open(io.BytesIO(read()))
    except UnidentifiedImageError:
        raise ValueError(f"{file}: not an image that can be decoded, remove it") from None


def _decoded(files: list[Picture], classes: tuple[str, ...], like: Image.Image) -> Split:
    """Decode every file in the colour mode of the image ``like``, grey or RGB; all must have its size."""
    mode = "L" if like.mode == "L" else "RGB"
    pixels = np.empty((len(files), like.height, like.width, len(mode)), np.uint8)
    console = Console(stderr=True)
    bar = track(files, "decoding", console=console, transient=True, disable=not console.is_terminal)
    for i, (label, file, read) in enumerate(bar):
        image = _opened(file, read).convert(mode)
        if image.size != like.size or label not in classes:
            raise ValueError(
                f"{file}: {image.size} pixels, class '{label}'; all must have {like.size} pixels and a class of the "
                "training half"
            )
        pixels[i] = np.asarray(image).reshape(pixels.shape[1:])
    labels = torch.tensor([classes.index(label) for label, _, _ in files])
    return Split(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels)
