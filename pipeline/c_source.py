"""Plain TIR functions as C99.

TVM's own C back end is not used: it prints floats with seven digits, knows neither popcounts nor vectors, and leaves
calls of its runtime. A vector becomes a loop over its lanes, which compilers turn into vectors again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import PointerType
from tvm.target.codegen import llvm_get_intrinsic_name

from pipeline.kernel import scalar

_LANE = "lane"
_TYPES = {"float32": "float", "float64": "double", "bool": "bool"}
_INFIX = {
    "Add": "+",
    "Sub": "-",
    "Mul": "*",
    "Div": "/",
    "Mod": "%",
    "EQ": "==",
    "NE": "!=",
    "LT": "<",
    "LE": "<=",
    "GT": ">",
    "GE": ">=",
    "And": "&&",
    "Or": "||",
    "BitwiseAnd": "&",
    "BitwiseOr": "|",
    "BitwiseXor": "^",
    "LShift": "<<",
    "RShift": ">>",
}
_COMPARISONS = {"EQ", "NE", "LT", "LE", "GT", "GE", "And", "Or"}
_NARROW = {"int8", "uint8", "int16", "uint16"}  # C computes these in int
_MATH = re.compile(
    "acos|asin|atan2?|ceil|copysign|cosh?|erf|exp2?|fabs|floor|fmod|hypot|log(10|1p|2)?|nearbyint|pow|rint|round|sinh?|sqrt"
    "|tanh?|trunc"
)


def type_name(dtype: str) -> str:
    """C's name of a scalar type: 'uint32' -> 'uint32_t'.

    Raises:
        ValueError: C99 has none.
    """
    if dtype in _TYPES:
        return _TYPES[dtype]
    if re.fullmatch(r"u?int(8|16|32|64)", dtype):
        return f"{dtype}_t"
    raise ValueError(f"{dtype} is no type of C99: compile with --emit c-lib")


def literal(value: float, dtype: str) -> str:
    """A constant that C reads back to the same bits."""
    if dtype in ("float32", "float64"):
        if value != value:
            return "NAN"
        if value in (float("inf"), float("-inf")):
            return "INFINITY" if value > 0 else "(-INFINITY)"
        digits = re.sub(r"\.?0*p", "p", float(value).hex())  # -0x1.8p+1, not -0x1.8000000000000p+1
        text = digits + ("f" if dtype == "float32" else "")
    elif dtype == "bool":
        return str(int(value))
    elif dtype == "int32" and value == -(2**31):
        return "INT32_MIN"
    elif dtype == "int64":
        return "INT64_MIN" if value == -(2**63) else f"INT64_C({int(value)})"
    else:
        text = f"{int(value)}{'u' if dtype == 'uint32' else ''}"
        text = f"UINT64_C({int(value)})" if dtype == "uint64" else text
    return f"({text})" if text.startswith("-") else text


def parameters(function: tirx.PrimFunc) -> list[str]:
    """The declarations of a function's parameters, pointers to what it only reads const."""
    return _Printer(function).signature()


def define(function: tirx.PrimFunc) -> str:
    """The definition of a plain function (see `kernel.Part`), static.

    Raises:
        ValueError: something that C99 or this printer lacks, an intrinsic of one CPU for instance.
    """
    return _Printer(function).text()


class _Printer:
    """One function. Names of variables are unique in it, so that scopes need not be watched."""

    def __init__(self, function: tirx.PrimFunc) -> None:
        self.function = function
        self.names: dict[Any, str] = {}
        self.used: set[str] = {_LANE}
        self.elements: dict[Any, int] = {}  # buffers of vectors: lanes of an element
        self.vectors: set[Any] = set()  # variables that are vectors, kept in arrays
        self.lines: list[str] = []
        self.depth = 1
        self.written = _written(function)

    def signature(self) -> list[str]:
        found = []
        for parameter in self.function.params:
            name = self.name(parameter)
            if isinstance(parameter.ty, PointerType):
                const = "" if parameter in self.written else "const "
                found.append(f"{const}{self.pointee(parameter)} *restrict {name}")
            else:
                found.append(f"{type_name(str(parameter.ty.dtype))} {name}")
        return found

    def text(self) -> str:
        signature = ", ".join(self.signature())
        self.statement(self.function.body)
        used = set(re.findall(r"\w+", " ".join(self.lines)))
        unused = [name for name in map(self.name, self.function.params) if name not in used]
        self.lines[:0] = [f"  (void){name};" for name in unused]
        name = str(self.function.attrs["global_symbol"])
        return "\n".join([f"static CROSSBIT_KERNEL int32_t {name}({signature}) {{", *self.lines, "}"])

    # Names and lines ----------------------------------------------------------------------------------------------

    def name(self, variable: Any) -> str:
        if variable not in self.names:
            stem = re.sub(r"\W", "_", str(variable.name)) or "v"
            stem = f"v{stem}" if stem[0].isdigit() else stem
            self.names[variable] = self.fresh(stem)
        return self.names[variable]

    def fresh(self, stem: str) -> str:
        name, i = f"{stem}_", 1  # the underscore keeps off C's keywords
        while name in self.used:
            name, i = f"{stem}_{i}", i + 1
        self.used.add(name)
        return name

    def line(self, text: str) -> None:
        self.lines.append("  " * self.depth + text)

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        self.line(f"{head} {{")
        self.depth += 1
        yield
        self.depth -= 1
        self.line("}")

    def each_lane(self, lanes: int, make: Callable[[], str]) -> None:
        """A line for every lane."""
        text = make()
        if lanes == 1:
            self.line(text)
        else:
            self.line(f"for (int32_t {_LANE} = 0; {_LANE} < {lanes}; ++{_LANE}) {text}")

    # Statements ---------------------------------------------------------------------------------------------------

    def statement(self, s: Any) -> None:
        getattr(self, f"_{type(s).__name__.lower()}", self._unknown)(s)

    def _unknown(self, s: Any) -> None:
        raise ValueError(f"{type(s).__name__} cannot be written in C99: compile with --emit c-lib")

    def _seqstmt(self, s: Any) -> None:
        for inner in s.seq:
            self.statement(inner)

    def _return(self, s: Any) -> None:
        self.line(f"return {self.value(s.value)};")

    def _evaluate(self, s: Any) -> None:
        if not isinstance(s.value, tirx.IntImm):
            self._unknown(s)

    def _attrstmt(self, s: Any) -> None:
        self.statement(s.body)

    def _for(self, s: Any) -> None:
        extent, start = self.value(s.extent), self.value(s.min)
        name, kind = self.name(s.loop_var), type_name(str(s.loop_var.ty.dtype))
        end = extent if start == "0" else f"{start} + {extent}"
        with self.block(f"for ({kind} {name} = {start}; {name} < {end}; ++{name})"):
            self.statement(s.body)

    def _ifthenelse(self, s: Any) -> None:
        with self.block(f"if ({_bare(self.value(s.condition))})"):
            self.statement(s.then_case)
        if s.else_case is not None:
            with self.block("else"):
                self.statement(s.else_case)

    def _allocbuffer(self, s: Any) -> None:
        dtype = self.element(s.buffer)
        size = self.elements[s.buffer] * math.prod(map(int, s.buffer.ty.shape))
        # GCC does not see that the first step of a sum fills it, and warns.
        initial = " = {0}" if size == 1 else ""
        self.line(f"{type_name(dtype)} {self.name(s.buffer)}[{size}]{initial};")

    def _declbuffer(self, s: Any) -> None:
        dtype = type_name(self.element(s.buffer))
        data = s.data
        if _op(data) == "tirx.handle_add_byte_offset":
            at = f"((char *){self.value(data.args[0])} + {self.value(data.args[1])})"
        else:
            source = data.args[0] if _op(data) == "tirx.buffer_data" else data
            at = self.name(source)
            if dtype == self.pointee(source):  # another name of the same pointer
                self.names[s.buffer] = at
                return
        const = "" if s.buffer in self.written else "const "
        self.line(f"{const}{dtype} *{self.name(s.buffer)} = ({const}{dtype} *){at};")

    def _bind(self, s: Any) -> None:
        dtype = tvm.DataType(str(s.var.ty.dtype))
        kind = type_name(str(dtype.with_lanes(1)))
        if dtype.lanes == 1:
            self.line(f"const {kind} {self.name(s.var)} = {_bare(self.value(s.value))};")
            return
        self.vectors.add(s.var)
        name = self.name(s.var)
        self.line(f"{kind} {name}[{dtype.lanes}];")
        self.each_lane(dtype.lanes, lambda: f"{name}[{_LANE}] = {_bare(self.value(s.value))};")

    def _bufferstore(self, s: Any) -> None:
        self.store(s.buffer, s.indices, s.value)

    def store(self, buffer: Any, indices: Any, value: Any) -> None:
        """A choice between values becomes one between stores: what is not chosen must not be loaded."""
        if _op(value).endswith("if_then_else") and tvm.DataType(str(value.args[0].ty.dtype)).lanes == 1:
            with self.block(f"if ({_bare(self.value(value.args[0]))})"):
                self.store(buffer, indices, value.args[1])
            with self.block("else"):
                self.store(buffer, indices, value.args[2])
            return
        lanes = tvm.DataType(str(value.ty.dtype)).lanes
        self.each_lane(lanes, lambda: f"{self.element_of(buffer, indices)} = {_bare(self.value(value))};")

    # Values: of the lane in a loop over lanes, where they are vectors ---------------------------------------------

    def element(self, buffer: Any) -> str:
        """The scalar type of a buffer, whose lanes are noted."""
        dtype = tvm.DataType(str(buffer.ty.dtype))
        self.elements[buffer] = dtype.lanes
        return str(dtype.with_lanes(1))

    def pointee(self, pointer: Any) -> str:
        """What a buffer or a parameter points to."""
        dtype = pointer.ty.element_type.dtype if isinstance(pointer.ty, PointerType) else pointer.ty.dtype
        return type_name(scalar(dtype))

    def element_of(self, buffer: Any, indices: Any) -> str:
        (index,) = indices
        lanes = self.elements[buffer]
        if lanes == 1:
            return f"{self.name(buffer)}[{_bare(self.value(index))}]"
        if tvm.DataType(str(index.ty.dtype)).lanes > 1:
            raise ValueError("a vector of vectors cannot be written in C99: compile with --emit c-lib")
        first = f"{int(index.value) * lanes}" if isinstance(index, tirx.IntImm) else f"{self.value(index)} * {lanes}"
        first = "" if first == "0" else f"{first} + "
        return f"{self.name(buffer)}[{first}{_LANE}]"

    def value(self, e: Any) -> str:
        kind = type(e).__name__
        if kind in _INFIX:
            left, right, dtype = self.value(e.a), self.value(e.b), scalar(e.ty.dtype)
            unsigned = (kind, dtype) == ("Mul", "uint16") or (kind == "LShift" and dtype.startswith("int"))
            if unsigned:  # int would overflow
                left = f"({type_name('uint64' if dtype == 'int64' else 'uint32')}){left}"
            text = f"({left} {_INFIX[kind]} {right})"
            cast = unsigned or (kind not in _COMPARISONS and dtype in _NARROW)
            return f"({type_name(dtype)}){text}" if cast else text
        return getattr(self, f"_value_{kind.lower()}", self._unknown_value)(e)

    def _unknown_value(self, e: Any) -> str:
        raise ValueError(f"{type(e).__name__} cannot be written in C99: compile with --emit c-lib")

    def _value_intimm(self, e: Any) -> str:
        return literal(int(e.value), str(e.ty.dtype))

    def _value_floatimm(self, e: Any) -> str:
        return literal(float(e.value), str(e.ty.dtype))

    def _value_var(self, e: Any) -> str:
        return f"{self.name(e)}[{_LANE}]" if e in self.vectors else self.name(e)

    def _value_not(self, e: Any) -> str:
        return f"!{self.value(e.a)}"

    def _value_bitwisenot(self, e: Any) -> str:
        dtype = scalar(e.ty.dtype)
        if dtype == "bool":
            return f"!{self.value(e.a)}"
        return f"({type_name(dtype)})~{self.value(e.a)}" if dtype in _NARROW else f"~{self.value(e.a)}"

    def _value_min(self, e: Any) -> str:
        return self.choice(e, "min")

    def _value_max(self, e: Any) -> str:
        return self.choice(e, "max")

    def choice(self, e: Any, which: str) -> str:
        return f"crossbit_{which}_{scalar(e.ty.dtype)}({self.value(e.a)}, {self.value(e.b)})"

    def _value_select(self, e: Any) -> str:
        return f"({self.value(e.condition)} ? {self.value(e.true_value)} : {self.value(e.false_value)})"

    def _value_cast(self, e: Any) -> str:
        return f"({type_name(scalar(e.ty.dtype))}){self.value(e.value)}"

    def _value_broadcast(self, e: Any) -> str:
        return self.value(e.value)

    def _value_ramp(self, e: Any) -> str:
        base, stride = self.value(e.base), self.value(e.stride)
        dtype = type_name(str(e.base.ty.dtype))
        lane = _LANE if dtype == "int32_t" else f"({dtype}){_LANE}"
        step = lane if isinstance(e.stride, tirx.IntImm) and int(e.stride.value) == 1 else f"{lane} * {stride}"
        return step if base.strip("u") == "0" else f"({base} + {step})"

    def _value_tensorload(self, e: Any) -> str:
        return self.element_of(e.source, e.indices)

    def _value_call(self, e: Any) -> str:
        op, dtype, kind = _op(e), tvm.DataType(str(e.ty.dtype)), scalar(e.ty.dtype)
        if op.endswith("if_then_else"):
            return "({} ? {} : {})".format(*map(self.value, e.args))
        if op == "tirx.popcount" and dtype.bits <= 32:
            word = self.value(e.args[0])
            word = f"(u{type_name(kind)}){word}" if kind in ("int8", "int16") else _bare(word)
            return f"({type_name(kind)})crossbit_popcount({word})"
        if op == "tirx.reinterpret" and scalar(e.args[0].ty.dtype) == kind:
            return self.value(e.args[0])  # only names the vector that it is, see `bitpack.as_vector`
        if op == "tirx.call_llvm_pure_intrin":
            return self.intrinsic(e)
        suffix, external = "f" if kind == "float32" else "", op in ("tirx.call_pure_extern", "tirx.call_extern")
        name = str(e.args[0].value) if external else op.rsplit(".", 1)[-1] + suffix
        if _MATH.fullmatch(name.removesuffix(suffix)) and kind in ("float32", "float64"):
            return f"{name}({', '.join(map(self.value, e.args[external:]))})"
        raise ValueError(f"{name if external else op} cannot be written in C99: compile with --emit c-lib")

    def intrinsic(self, e: Any) -> str:
        number, *arguments = e.args
        name = llvm_get_intrinsic_name(int(number.value))
        if name == "llvm.arithmetic.fence":  # the whole file forbids contraction
            return self.value(arguments[0])
        if name == "llvm.vector.reduce.or":
            total = self.fresh("bits")
            self.line(f"{type_name(str(e.ty.dtype))} {total} = 0;")
            lanes = tvm.DataType(str(arguments[0].ty.dtype)).lanes
            self.each_lane(lanes, lambda: f"{total} |= {_bare(self.value(arguments[0]))};")
            return total
        raise ValueError(f"the intrinsic {name} cannot be written in C99: compile with --emit c-lib")


def _bare(text: str) -> str:
    """Without parentheses around the whole."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0 and i < len(text) - 1:
            return text
    return text[1:-1] if text.startswith("(") else text


def _op(e: Any) -> str:
    return str(getattr(getattr(e, "op", None), "name", ""))


def _written(function: tirx.PrimFunc) -> set[Any]:
    """Buffers that are stored to, and whatever pointer they are views of."""
    written: set[Any] = set()
    views: list[tuple[Any, Any]] = []

    def declared(s: Any) -> None:
        source = s.data
        while _op(source) in ("tirx.buffer_data", "tirx.handle_add_byte_offset"):
            source = source.args[0]
        views.append((s.buffer, source))

    tvm_ffi.structural_walk(
        function.body, [(tirx.BufferStore, lambda s: written.add(s.buffer)), (tirx.DeclBuffer, declared)]
    )
    for view, source in reversed(views):
        if view in written:
            written.add(source)
    return written
