"""[[ name ]]: a network compiled by crossbit [[ version ]] for [[ manifest.target ]], from Python. Generated: do not edit.

    import numpy as np
    from [[ name ]] import Network

    outputs = Network().run({[[ tensors | selectattr("role", "eq", "input") | map(attribute="spec") | map(attribute="name") | map("quoted") | first ]]: ...})

Needs NumPy and lib[[ name ]].so beside this file.
"""

import ctypes
from pathlib import Path

import numpy as np

INPUTS = {
{% for t in tensors if t.role == "input" %}
    [[ t.spec.name | quoted ]]: ([[ t.spec.shape | join(", ") ]][[ "," if t.spec.shape | length == 1 ]]),
{% endfor %}
}
OUTPUTS = {
{% for t in tensors if t.role == "output" %}
    [[ t.spec.name | quoted ]]: ([[ t.spec.shape | join(", ") ]][[ "," if t.spec.shape | length == 1 ]]),
{% endfor %}
}
_INTERFACE = 0x[[ "%08x" % interface ]]
_WORKSPACE_BYTES, _ALIGNMENT = [[ record.workspace_bytes ]], [[ alignment ]]


class Network:
    """The loaded library and a workspace: for one thread at a time, another Network for another thread.

    Raises:
        OSError: the library cannot be loaded here.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(str(Path(__file__).parent / "lib[[ name ]].so"))
        self._error = library.[[ name ]]_strerror
        self._error.restype, self._error.argtypes = ctypes.c_char_p, [ctypes.c_int]
        self._run = library.[[ name ]]_run_with
        self._run.restype = ctypes.c_int
        tensors = [ctypes.c_void_p] * (len(INPUTS) + len(OUTPUTS))
        self._run.argtypes = [ctypes.c_uint32, *tensors, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self._memory = np.empty(_WORKSPACE_BYTES + _ALIGNMENT, np.uint8)
        self._workspace = self._memory.ctypes.data + -self._memory.ctypes.data % _ALIGNMENT

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name for float32 inputs by name.

        Raises:
            ValueError: a wrong name, shape or dtype.
            RuntimeError: the library refuses to run, for instance on this CPU.
        """
        call, outputs, _kept = self.prepare(inputs)
        call()
        return outputs

    def prepare(self, inputs):
        """A function that runs once, the outputs that it writes, and the inputs that it reads."""
        if set(inputs) != set(INPUTS):
            raise ValueError(f"the inputs are {sorted(INPUTS)}, given {sorted(inputs)}")
        for name, shape in INPUTS.items():
            array = inputs[name]
            if array.shape != shape or array.dtype != np.float32:
                raise ValueError(
                    f"input '{name}' is float32 {list(shape)}, given {array.dtype} {list(array.shape)}"
                )
        given = [np.require(inputs[name], requirements=["C", "ALIGNED"]) for name in INPUTS]
        outputs = {name: np.empty(shape, np.float32) for name, shape in OUTPUTS.items()}
        pointers = [array.ctypes.data for array in (*given, *outputs.values())]

        def call() -> None:
            status = self._run(_INTERFACE, *pointers, self._workspace, _WORKSPACE_BYTES, None)
            if status:
                raise RuntimeError(f"[[ name ]]: {self._error(status).decode()}")

        return call, outputs, given
