"""Evidence of sensitivities as ``calibrate`` would write it, made up: any numbers, of any tensors."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.codebook import BITS, GroupSize, fitting
from kappaquant.models.roles import Role, kind_of
from kappaquant.planning.sensitivity import Sensitivities, TensorErrors, Unit

_LEFT_OUT = (Role.VISION, Role.MTP)


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
    found: dict[tuple[int | None, Role], list[str]] = {}
    errors = {}
    for name, info in tensors.items():
        kind = kind_of(name, info, config)
        if kind.refuse or kind.role in _LEFT_OUT:
            continue
        found.setdefault((kind.layer, kind.role), []).append(name)
        noise = rng.lognormvariate(0, 0.1)
        ids = {width: fitting(width, info.shape[-1], group_size).id for width in bits}
        errors[name] = TensorErrors(float(info.numel), {ids[width]: noise * 4.0 ** (1 - width) for width in bits})
    at = 3 if 3 in bits else bits[0]
    units = []
    for (layer, role), names in found.items():
        value = kld(names[0]) if kld else rng.lognormvariate(-6, 1.2)
        family = kind_of(names[0], tensors[names[0]], config).family
        units.append(Unit(layer, family, role.value, tuple(names), at, value, (0.9 * value, 1.1 * value), None))
    made = Sensitivities(
        kind="calibration", model="made-up", revision=None, sha256="0" * 64, text={}, effort="best", group_size=group_size,
        units=tuple(units), tensors=errors, kurtosis={name: rng.uniform(-1, 20) for name in errors},
    )  # fmt: skip
    return replace(made, **fields)


def of_weights(evidence: Sensitivities) -> Sensitivities:
    """The same, as it is where no text was read."""
    units = tuple(replace(unit, kld=None, interval_95=None) for unit in evidence.units)
    return replace(evidence, kind="weights", units=units)
