"""What a user says of a budget, as bytes: sizes with units, bits per weight, memory that weights share with keys and values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from kappaquant.errors import BudgetError, PlanError
from kappaquant.files.safetensors import TensorInfo
from kappaquant.models.keys_values import kv_bytes
from kappaquant.planning.sizes import shown

UNITS = {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
UNITS |= {"B": 1} | {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}
_RESERVE_SHARE, _LEAST_RESERVE = 20, 1 << 30  # a twentieth of the memory, or 1 GiB


def parse_size(text: str, option: str = "size") -> int:
    """Bytes that a number and a unit say, such as 18GB (10⁹ bytes each) or 17.5GiB (2³⁰ each). Raises PlanError, which names ``option``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    unit = next((unit for unit in UNITS if found and unit.lower() == found[2].lower()), None)
    if not found or not unit:
        raise PlanError(
            f"{option} {text!r}: write a number and a unit, such as 18GB or 17.5GiB; the units are B, KB, MB, GB and TB of 1000, and "
            "KiB, MiB, GiB and TiB of 1024"
        )
    return int(Decimal(found[1]) * UNITS[unit])


def size_of_bits(bits_per_weight: float, tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes that all tensors may take where their weights, whatever becomes of them, have so many bits in the mean. Raises PlanError."""
    if not math.isfinite(bits_per_weight) or bits_per_weight <= 0:
        raise PlanError(f"bits per weight = {bits_per_weight}: must be a number above 0, such as 3.5")
    return int(Decimal(str(bits_per_weight)) * sum(info.numel for info in tensors.values()) / 8)


@dataclass(frozen=True)
class Fit:
    """Memory that weights share with what decoding needs.

    Attributes:
        memory: bytes there are.
        context: tokens whose keys and values must find room.
        cache: bytes of these.
        reserve: bytes for activations, recurrent states and the engine itself.
    """

    memory: int
    context: int
    cache: int
    reserve: int

    @property
    def weights(self) -> int:
        """Bytes that are left for the weights."""
        return self.memory - self.cache - self.reserve

    def __str__(self) -> str:
        return (
            f"of {self.memory:,} bytes ({shown(self.memory)}), keys and values of {self.context:,} tokens take {shown(self.cache)}, "
            f"{shown(self.reserve)} are held in reserve, and {shown(self.weights)} are left for weights"
        )


def fit(memory: int, context: int, config: Mapping[str, Any]) -> Fit:
    """How ``memory`` bytes are shared where one sequence of ``context`` tokens is decoded; the reserve is a twentieth, or 1 GiB.

    Raises:
        PlanError: the context is no positive number, or config.json does not say what a token's keys and values take.
        BudgetError: nothing is left for weights.
    """
    if context < 1:
        raise PlanError(f"context {context}: must be 1 or more tokens")
    shared = Fit(memory, context, kv_bytes(config, context), max(memory // _RESERVE_SHARE, _LEAST_RESERVE))
    if shared.weights <= 0:
        least = shown(shared.cache + shared.reserve)
        raise BudgetError(
            f"{shown(memory)} with a context of {context:,} tokens: keys and values take {shown(shared.cache)} and the reserve "
            f"{shown(shared.reserve)}, so that {least} are needed before any weights; take more memory or a shorter context"
        )
    return shared
