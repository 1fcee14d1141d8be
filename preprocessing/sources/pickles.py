"""Pickles from outside, read as data: numbers, text, lists, tables and NumPy arrays. Nothing in them is executed.

A pickle is a program: it imports names and calls them. Here the few names that NumPy's arrays need lead to functions of
this file, which check what they are given, and any other name is refused
(https://docs.python.org/3/library/pickle.html#restricting-globals). The pure Python unpickler runs it, for that in C
takes memory by numbers which the pickle chooses.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import tokenize
from typing import Any, ClassVar

import numpy as np

from preprocessing.episode import BadEpisode

PLAIN = re.compile(r"[?biufSUO]\d*")  # booleans, numbers, text, objects


def read_pickle(data: bytes) -> Any:
    """What it holds, arrays as ``np.ndarray``. BadEpisode where it asks for anything else, or breaks."""
    try:
        return _Arrays().of(_Unpickler(io.BytesIO(data)).load())
    except Exception as error:  # bytes from outside break an unpickler in a dozen ways
        raise BadEpisode(f"a pickle that cannot be read: {type(error).__name__}: {error}") from None


def read_npy(data: bytes) -> Any:
    """A ``.npy`` file, of objects as well: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, kind = read(file)
        if kind.hasobject:
            values = read_pickle(data[file.tell() :])
            return values.item() if shape == () else values
        # NumPy itself would take memory for as many values as the header says, before it reads one.
        return np.frombuffer(data, kind, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
    except (ValueError, TypeError, SyntaxError, EOFError, OverflowError, tokenize.TokenError) as error:
        raise BadEpisode(f"a .npy file that cannot be read: {' '.join(str(error).split())}") from None


class _DType:
    """``numpy.dtype(code, ...)``, whose state then names the order of its bytes."""

    def __init__(self, code: str, *_: Any):
        if not PLAIN.fullmatch(code):
            raise ValueError(f"an array of {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """``numpy._reconstruct(ndarray, (0,), b"b")``, whose state then is all of it."""

    def __init__(self, *_: Any):
        self.shape: tuple[int, ...] = (0,)
        self.values: Any = b""
        self.kind = _DType("u1")
        self.order = "C"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.kind, fortran, self.values = state
        self.order = "F" if fortran else "C"


def _from_buffer(values: Any, kind: _DType, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", values))
    return array


def _scalar(kind: _DType, values: Any) -> Any:
    return np.frombuffer(values, kind.dtype)[0]


def _encode(text: str, *_: Any) -> bytes:
    return text.encode("latin1")  # how protocols before 3 write bytes


def _no_bytes() -> bytes:
    return b""  # and the empty ones


def _marker(*_: Any) -> None:
    raise ValueError("numpy.ndarray is called")


KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _marker,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("collections", "OrderedDict"): dict,
}
for package in ("numpy.core", "numpy._core"):  # before NumPy 2 and since
    KNOWN[f"{package}.multiarray", "_reconstruct"] = _Array
    KNOWN[f"{package}.multiarray", "scalar"] = _scalar
    KNOWN[f"{package}.numeric", "_frombuffer"] = _from_buffer


_Python: Any = pickle._Unpickler


class _Unpickler(_Python):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise ValueError(f"it asks for {module}.{name}")
        return KNOWN[module, name]

    def load_build(self) -> None:
        """A state is given to arrays alone: else a pickle could change the functions above."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Array | _DType):
            raise ValueError(f"it gives {type(self.stack[-1]).__name__} a state")
        self.stack[-1].__setstate__(state)

    def load_bytearray8(self) -> None:
        """No memory for more bytes than there are."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    dispatch: ClassVar = {
        **_Python.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


class _Arrays:
    """Puts arrays in place of what was kept of them. What is there several times is looked at once."""

    def __init__(self) -> None:
        self._done: dict[int, Any] = {}
        self._kept: list[Any] = []  # as long as an id stands for an object, that object must live

    def of(self, value: Any) -> Any:
        if id(value) in self._done:
            return self._done[id(value)]
        self._kept.append(value)
        match value:
            case dict():
                done: Any = {key: self.of(item) for key, item in value.items()}
            case list():
                done = [self.of(item) for item in value]
            case tuple():
                done = tuple(self.of(item) for item in value)
            case _Array():
                done = self._array(value)
            case _DType():
                done = value.dtype
            case _:
                done = value
        self._done[id(value)] = done
        return done

    def _array(self, kept: _Array) -> np.ndarray:
        if kept.kind.dtype.hasobject:
            if math.prod(kept.shape) != len(kept.values):
                raise ValueError("an array whose shape is not that of its values")
            array = np.empty(len(kept.values), object)
            for place, item in enumerate(kept.values):
                array[place] = self.of(item)
        else:
            array = np.frombuffer(kept.values, kept.kind.dtype)
        return array.reshape(kept.shape, order=kept.order)  # type: ignore[call-overload]
