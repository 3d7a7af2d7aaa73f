"""crossbit: torch networks quantised to a few bits, compiled to tuned shared libraries.

Two halves meet in an ONNX file and never in one module: the torch half (quantizers, layers, models, data, train,
deploy, export) and the TVM half (importer, compiler, tune, artifact,
session, remote, bench).
"""

import os

from targets import cores

# TVM makes one thread pool a process, at the first kernel that runs, and it never grows. Left to itself it takes what
# it believes to be physical cores (one, on a two-core virtual machine) and binds threads to cores that may be busy.
os.environ.setdefault("TVM_NUM_THREADS", str(cores()))
os.environ.setdefault("TVM_BIND_THREADS", "0")
