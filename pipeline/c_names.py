"""Names and strings that C, C++, Python and CMake all take."""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Sequence


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text))


_KEYWORDS = _words(  # of C and C++
    """alignas alignof and and_eq asm auto bitand bitor bool break case catch char char16_t char32_t char8_t class
    co_await co_return co_yield compl concept const const_cast consteval constexpr constinit continue decltype
    default delete do double dynamic_cast else enum explicit export extern false float for friend goto if inline
    int long mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected public
    register reinterpret_cast requires restrict return short signed sizeof static static_assert static_cast
    struct switch template this thread_local throw true try typedef typeid typename typeof union unsigned using
    virtual void volatile wchar_t while xor xor_eq"""
)
_IN_RUN = _words(  # other names that the run function uses, or that compilers define
    """a apart attributes block constants cudaError_t cudaSuccess dim3 freed interface_id launch linux memcpy memory
    pool share size_t status stream supported uint32_t uintptr_t unix weights workspace workspace_bytes"""
)
_MACROS = r"NULL|NAN|INFINITY|HUGE_VAL.*|(FP|MATH|M|U?INT\w*|SIZE|PTRDIFF|WCHAR|WINT|SIG)_.*|crossbit_.*|constant\d+"
_LIBRARIES = _words(  # what a header, library, module or CMake target of the same name would hide
    """assert complex ctype errno fenv inttypes iso646 limits locale malloc memory pthread setjmp signal stdarg
    stdatomic stdbool stddef stdint stdio stdlib string strings tgmath threads time unistd wchar wctype c dl m
    rt util crossbit numpy all clean help install package test"""
)


def check_library(name: str) -> str:
    """``name``, if a C library can be called that.

    Raises:
        ValueError: it is no identifier, or something else has that name.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise ValueError(f"'{name}' cannot name a C library: give --name with letters, digits and underscores")
    lower = name.lower()  # file systems may ignore case
    if lower in _KEYWORDS | _LIBRARIES | sys.stdlib_module_names or keyword.iskeyword(name):
        raise ValueError(f"'{name}' cannot name a C library: a word or library of C, C++ or Python is called so")
    return name


def quoted(text: str) -> str:
    """A string of C, that a comment may hold too: without trigraphs, ends or beginnings of comments, or bytes > 127."""
    plain = (c if re.match(r"[A-Za-z0-9_ .:/+-]", c) else "".join(f"\\{b:03o}" for b in c.encode()) for c in text)
    return f'"{"".join(plain)}"'


def parameters(tensors: Sequence[str], library: str) -> list[str]:
    """A name in C for each of the ``tensors``, as near to its own as can be; unequal even in capitals, for macros.

    Args:
        library: a name that all symbols of the library start with.
    """
    elsewhere = re.compile(f"{_MACROS}|{library}_.*", re.IGNORECASE)
    found: list[str] = []
    taken: set[str] = set()
    for name in tensors:
        stem = re.sub(r"\W", "_", name, flags=re.ASCII)
        stem = stem if re.match(r"[A-Za-z]", stem) and not elsewhere.fullmatch(stem) else f"t{stem}"
        unique, i = stem, 2
        while unique.lower() in taken or unique in _KEYWORDS | _IN_RUN:
            unique, i = f"{stem}_{i}", i + 1
        taken.add(unique.lower())
        found.append(unique)
    return found
