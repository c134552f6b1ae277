"""JSON values as typed dataclasses, every value checked; what is wrong is named by file and place."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from kappaquant.errors import FormatError

_PLAIN = {float: "a finite number", int: "a whole number", str: "a string", bool: "true or false"}


def read_as(value: Any, kind: Any, file: str, place: str = "") -> Any:
    """A JSON value as the type ``kind``: dataclasses, tuples, lists, dicts, unions with None, and plain values.

    Args:
        file: whose content it is; place: where in it, such as "divergence.mean".

    Raises:
        FormatError: it is of another kind, a field is missing or unknown, or a number is not finite.
    """
    if is_dataclass(kind):
        return _read_object(value, kind, file, place)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None:
            return None
        return read_as(value, next(a for a in arguments if a is not type(None)), file, place)
    if kind is Any:
        return value
    if origin is tuple and arguments[-1] is not ...:
        if not isinstance(value, list) or len(value) != len(arguments):
            raise FormatError(f"{file}: {place} is {value!r}; expected a list of {len(arguments)}")
        return tuple(
            read_as(v, a, file, f"{place}[{i}]") for i, (v, a) in enumerate(zip(value, arguments, strict=True))
        )
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise FormatError(f"{file}: {place} is {value!r}; expected a list")
        return origin(read_as(v, arguments[0], file, f"{place}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise FormatError(f"{file}: {place} is {value!r}; expected an object")
        return value
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (kind is float and not math.isfinite(value)):
        raise FormatError(f"{file}: {place} is {value!r}; expected {_PLAIN[kind]}")
    return kind(value)


def _read_object(value: Any, kind: Any, file: str, place: str) -> Any:
    if not isinstance(value, dict):
        raise FormatError(f"{file}: {place} is {value!r}; expected an object")
    prefix = f"{place}." if place else ""
    types = get_type_hints(kind)
    names = [f.name for f in fields(kind)]
    later = {f.name for f in fields(kind) if f.default is None}  # older files do without
    for name in names:
        if name not in value and name not in later:
            raise FormatError(f"{file}: has no {prefix}{name}; measure again with kappaquant evaluate")
    unknown = sorted(value.keys() - set(names))
    if unknown:
        raise FormatError(f"{file}: {prefix}{unknown[0]} is not known; allowed there: {', '.join(names)}")
    return kind(**{name: read_as(value.get(name), types[name], file, prefix + name) for name in names})
