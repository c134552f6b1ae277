"""Evidence of sensitivities without a measurement: numbers as a calibration has them, the same for the same model."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.codebook import GroupSize, fitting
from kappaquant.formats.kinds import KINDS
from kappaquant.models.inventory import Inventory
from kappaquant.models.role_defaults import Role
from kappaquant.planning.sensitivity import Sensitivities, TensorErrors, Unit
from kappaquant.quantizing.calibration.written import model_of
from kappaquant.sources.source import Source

ERRORS = {2: 0.114, 3: 0.0316, 4: 0.00778, 5: 0.00189, 6: 0.00047, 7: 0.00012, 8: 0.00003}  # of a Gaussian
SHARES = {"k": 1.0, "t": 0.9}  # of these, in formats of a kind; near enough that some tensors lose less in either


def evidence_of(source: Source, **options: Any) -> Sensitivities:
    """As if it had been measured of this source."""
    return replace(evidence(source.tensors, source.config, **options), sha256=model_of(source).sha256)


def evidence(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    *,
    kind: str = "calibration",
    model: str = "someone/model",
    widths: Iterable[int] = tuple(ERRORS),
    group_size: GroupSize = "auto",
    outer: bool = True,
    kinds: str = "k",
) -> Sensitivities:
    """Of each tensor that a policy decides, and with ``outer`` of embeddings and head, which may shrink as well."""
    draw, inventory, widths = random.Random(7), Inventory(tensors, config), tuple(widths)
    members: dict[tuple[int | None, Role], list[str]] = {}
    for name, each in inventory.kinds.items():
        if not each.refuse and (not each.keep or (outer and each.role in (Role.EMBEDDING, Role.LM_HEAD))):
            members.setdefault((each.layer, each.role), []).append(name)
    errors = {
        name: TensorErrors(
            draw.lognormvariate(5, 1),
            {
                KINDS[kind].make(bits, fitting(bits, tensors[name].shape[-1], group_size).group_size).id: ERRORS[bits]
                * SHARES[kind]
                * draw.lognormvariate(0, 0.2)
                for kind in kinds
                for bits in widths
                if bits in KINDS[kind].bits
            },
        )
        for names in members.values()
        for name in names
    }
    units = []
    for (layer, role), names in members.items():
        kld = draw.lognormvariate(-7, 1) if kind == "calibration" else None
        interval = None if kld is None else (0.9 * kld, 1.1 * kld)
        family = inventory.kinds[names[0]].family
        units.append(Unit(layer, family, str(role), tuple(names), widths[0], kld, interval, None, kinds[0]))
    return Sensitivities(
        kind, model, None, "0" * 64, {"name": "text.txt", "tokens": 4096}, "calibrated", group_size, tuple(units), errors,
        {name: draw.lognormvariate(0, 1) for name in errors},
    )  # fmt: skip
