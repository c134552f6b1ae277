"""Evidence of sensitivities as ``calibrate`` would write it, made up: any numbers, of any tensors."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.codebook import BITS, GroupSize, fitting
from kappaquant.models.roles import kind_of
from kappaquant.planning.sensitivity import Sensitivities, TensorErrors, decided, units_of


def evidence_of(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    *,
    group_size: GroupSize = "auto",
    bits: tuple[int, ...] = tuple(BITS),
    seed: int = 0,
    kld: Callable[[str], float] | None = None,
    **fields: Any,
) -> Sensitivities:
    """A unit for each layer and role that may be packed, with errors that a bit divides by four.

    Args:
        bits: widths that were measured; units' divergences are at 3, or at the first of these.
        kld: first tensor of a unit -> its divergence; random over two decades unless given.
        fields: of ``Sensitivities``, in place of the usual ones.
    """
    rng = random.Random(seed)
    kinds = {name: kind_of(name, info, config) for name, info in tensors.items()}
    names = [name for name, kind in kinds.items() if decided(kind)]
    errors = {}
    for name in names:
        noise, info = rng.lognormvariate(0, 0.1), tensors[name]
        ids = {width: fitting(width, info.shape[-1], group_size).id for width in bits}
        errors[name] = TensorErrors(float(info.numel), {ids[width]: noise * 4.0 ** (1 - width) for width in bits})
    units = []
    for unit in units_of(kinds, names, 3 if 3 in bits else bits[0]):
        value = kld(unit.tensors[0]) if kld else rng.lognormvariate(-6, 1.2)
        units.append(replace(unit, kld=value, interval_95=(0.9 * value, 1.1 * value)))
    made = Sensitivities(
        kind="calibration", model="made-up", revision=None, sha256="0" * 64, text={}, effort="best", group_size=group_size,
        units=tuple(units), tensors=errors, kurtosis={name: rng.uniform(-1, 20) for name in errors},
    )  # fmt: skip
    return replace(made, **fields)


def with_trellis(known: Sensitivities, factor: Callable[[str], float]) -> Sensitivities:
    """The same evidence with errors of trellis codes, so many times those of codebooks, by tensor."""
    tensors = {}
    for name, each in known.tensors.items():
        more = {fmt.replace("tq", "t"): factor(name) * error for fmt, error in each.errors.items() if fmt[2] in "234"}
        tensors[name] = replace(each, errors={**each.errors, **more})
    return replace(known, tensors=tensors)


def of_weights(evidence: Sensitivities) -> Sensitivities:
    """The same, as it is where no text was read."""
    units = tuple(replace(unit, bits=None, kld=None, interval_95=None) for unit in evidence.units)
    return replace(evidence, kind="weights", units=units)
