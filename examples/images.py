"""Digits that the recipe `digits` was not trained on, in the forms that the examples read.

python examples/images.py FOLDER [COUNT]

FOLDER/images.bin: raw float32, one image of 64 values after the other; FOLDER/images.h: the same for a C compiler;
FOLDER/labels.txt: what they are, a digit a line.
"""

import sys
from pathlib import Path

import numpy as np

from pipeline.data import load, to_float


def write(images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """images: float32 [N, ...]. labels: [N]. The folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = images.reshape(len(images), -1)
    rows.tofile(folder / "images.bin")
    values = ",\n".join("  {" + ", ".join(f"{float(value).hex()}f" for value in row) + "}" for row in rows)
    count, elements = rows.shape
    (folder / "images.h").write_text(f"static const float images[{count}][{elements}] = {{\n{values}\n}};\n")
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in labels))


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("usage: python examples/images.py FOLDER [COUNT]")
    count = int(sys.argv[2]) if len(sys.argv) == 3 else 20
    test = load("digits").test
    write(to_float(test.images[:count]).numpy(), test.labels[:count].numpy(), Path(sys.argv[1]))
