"""Classify images: python classify.py FILE. FILE holds raw float32 images, one after the other; a label a line.

Needs NumPy, and digits.py and libdigits.so of `crossbit compile --emit c-lib --name digits` beside this file or on
PYTHONPATH.
"""

import sys

import numpy as np
from digits import INPUTS, Network

if len(sys.argv) != 2:
    sys.exit("usage: python classify.py FILE")
shape = INPUTS["x"]  # [1, 1, 8, 8]
values = np.fromfile(sys.argv[1], np.float32)
if values.size % np.prod(shape):
    sys.exit(f"{sys.argv[1]}: {values.size} values are no whole number of images of {np.prod(shape)}")
network = Network()
for image in values.reshape(-1, *shape):
    print(network.run({"x": image})["y"].argmax())
