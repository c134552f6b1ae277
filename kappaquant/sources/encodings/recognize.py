"""Which stored tensors of a source stand for which tensors of its model."""

from __future__ import annotations

import re
from collections.abc import Mapping

from kappaquant.errors import SourceError
from kappaquant.files.safetensors import TensorInfo
from kappaquant.sources.encodings.base import Encoded, Encoding
from kappaquant.sources.encodings.fp4 import GroupedFp4
from kappaquant.sources.encodings.fp8 import ScaledFp8
from kappaquant.sources.encodings.mxfp4_experts import Mxfp4Experts
from kappaquant.sources.encodings.scheme import Scheme

ENCODINGS: tuple[type[Encoding], ...] = (Mxfp4Experts, GroupedFp4, ScaledFp8)
"""In the order in which they take what they know: scales of one may have the dtype of another's codes."""
_ACTIVATIONS = re.compile(
    r"[._](input_scale|input_global_scale|input_activation_scale|activation_scale|output_scale|[qkv]_scale|kv_scale|prob_scale)$"
)
"""Scales of activations and of cached keys and values: nothing of the weights is in them."""
_FLOATS = ("F32", "F16", "BF16")
_SCALE_OF = re.compile(r"(.*(?:weight|_proj))_(scale_inv|scale|scale_2|global_scale|blocks|scales|packed)")


def recognize(
    label: str, tensors: Mapping[str, TensorInfo], scheme: Scheme
) -> tuple[dict[str, Encoded], frozenset[str]]:
    """The encoded tensors by the name they are presented under, and the stored tensors that nothing is to be made of.

    Raises:
        SourceError: a part is missing, left over or misshapen, or nothing is encoded at all.
    """
    dropped = frozenset(name for name, info in tensors.items() if _ACTIVATIONS.search(name) and info.dtype in _FLOATS)
    left = {name: info for name, info in tensors.items() if name not in dropped}
    found: dict[str, Encoded] = {}
    for kind in ENCODINGS:
        for encoded in list(kind.find(left, scheme)):
            name = encoded.info.name
            if name in found or (name in tensors and name != encoded.codes):
                raise SourceError(f"{label}: {name} is stored twice, as it is and as {encoded.codes}; remove one")
            found[name] = encoded
            for part in encoded.parts.values():
                left.pop(part, None)
    for name in left:
        if match := _SCALE_OF.fullmatch(name):
            of = left.get(match[1])
            state = f"{of.name} is {of.dtype}, not quantized" if of else "there are no weights that it belongs to"
            raise SourceError(f"{label}: {name} is left over: {state}; fetch the model again")
    if not found and not dropped:
        raise SourceError(
            f"{label}/config.json: says that the weights are stored as {scheme.method}, but none is; if they are plain floats, "
            "take quantization_config out of it"
        )
    return found, dropped
