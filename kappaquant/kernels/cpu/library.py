"""The native core: a shared library of plain functions, built with the package where there is a compiler, and called through ctypes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.formats.signs import signs
from kappaquant.formats.trellis import TRELLIS
from kappaquant.kernels.cpu.structures import STRUCTURES, Encoding, Feedback, Weight

NAME = "_core"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""As numbers.h counts them."""


@dataclass(frozen=True)
class Core:
    """The library, and the instruction set that it is asked to use.

    Attributes:
        level: its number, the fastest being the first.
        name: of the instruction set.
    """

    library: ctypes.CDLL
    level: int
    name: str


@cache
def absence() -> str:
    """Why there is no native core here; empty where there is one."""
    try:
        found = levels()
    except OSError as problem:
        return f"the native core cannot be loaded ({problem})"
    if not found:
        return (
            "kappaquant was installed without its native core, for want of a C++ compiler: install one (g++ or clang) and then "
            "kappaquant again"
        )
    if not any(found.values()):
        return f"this processor has none of the instruction sets of the native core ({', '.join(found)})"
    return ""


@cache
def core(name: str = "") -> Core:
    """The library with the fastest instruction set of this processor, or the one of that name.

    Raises:
        UnsupportedError: there is none.
    """
    if reason := absence():
        raise UnsupportedError(reason)
    known = levels()
    for number, (level, here) in enumerate(known.items()):
        if here and name in ("", level):
            return Core(_library(), number, level)
    raise UnsupportedError(
        f"instruction set {name!r}: this processor has {', '.join(level for level, here in known.items() if here)}"
    )


def levels() -> dict[str, bool]:
    """Instruction sets of the library, fastest first, and whether this processor has them; none without a library."""
    if not _path():
        return {}
    found: dict[str, bool] = {}
    library = _library()
    for number in range(library.kq_levels()):
        found[library.kq_level_name(number).decode()] = bool(library.kq_level_runs(number))
    return found


@cache
def signs_of(group_size: int) -> Tensor:
    """s1 and s2, float32 [2 * group_size]."""
    return torch.tensor([sign for half in signs(group_size) for sign in half], dtype=torch.float32)


def _path() -> Path | None:
    places = (Path(__file__).with_name(NAME + suffix) for suffix in EXTENSION_SUFFIXES)
    return next((place for place in places if place.is_file()), None)


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_path()))
    weight, prepared = POINTER(Weight), [c_void_p] * 4  # int8 values, scales, offsets; or floats
    call = [c_int32, c_int32]  # level, threads
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "kq_weight_bytes": (c_int32, []),
        "kq_trellis_taps": (c_int32, [c_int32]),
        "kq_levels": (c_int32, []),
        "kq_level_name": (c_char_p, [c_int32]),
        "kq_level_runs": (c_int32, [c_int32]),
        "kq_prepare": (None, [*call, c_void_p, c_int32, c_int64, c_int64, c_int64, c_int32, c_void_p, *prepared]),
        "kq_linear": (None, [*call, weight, *prepared, c_int64, c_void_p, c_void_p, c_int32]),
        "kq_grouped": (None, [*call, weight, *prepared, c_void_p, c_int64, c_int64, c_void_p]),
        "kq_experts": (
            None,
            [*call, weight, weight, *prepared, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int32],
        ),
        "kq_step_bytes": (c_int64, [c_int32]),
        "kq_queries": (None, [*call, *[c_void_p] * 6]),
        "kq_attend": (None, [*call, *[c_void_p] * 5, c_int64]),
        "kq_attention": (None, [*call, *[c_void_p] * 4, c_int64]),
        "kq_deltanet": (None, [*call, *[c_void_p] * 3, c_int32, c_int64, c_void_p]),
        "kq_layers": (c_int32, [*call, *[c_void_p] * 2, c_int64, *[c_void_p] * 2]),
        "kq_apply": (None, [*call, *[c_void_p] * 2]),
        "kq_mlp": (None, [*call, *[c_void_p] * 2]),
        "kq_moe": (None, [*call, *[c_void_p] * 2]),
        "kq_encoding_bytes": (c_int32, []),
        "kq_encode": (None, [*call, POINTER(Encoding)]),
        "kq_feedback_bytes": (c_int32, []),
        "kq_feedback": (None, [*call, POINTER(Encoding), POINTER(Feedback)]),
    }
    mine = [ctypes.sizeof(each) for each in (Weight, Encoding, Feedback, *STRUCTURES)]
    mine += [sum(1 << back for back in backs) for backs in (TRELLIS.lower, TRELLIS.upper)]
    try:
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        its = [library.kq_weight_bytes(), library.kq_encoding_bytes(), library.kq_feedback_bytes()]
        its += [library.kq_step_bytes(number) for number in range(len(STRUCTURES))]
        its += [library.kq_trellis_taps(bit) for bit in range(2)]
    except AttributeError:  # it lacks a function
        its = []
    if its != mine:
        raise OSError(f"{_path()} is of another version of kappaquant; install the package again")
    return library
