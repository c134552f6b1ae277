"""Plans by measured sensitivity of the real model, each at the bytes of another row: what ``calibrate`` and ``plan --size`` make.

The bytes are those of all tensors, so the embedding shrinks too. Both of a pair are calibrated on the same text, if at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

from benchmarks.real_measure import GROUP, Bench, Packed, Variant
from benchmarks.reference_table import quantized
from kappaquant.planning.plan import Plan


def variants(rows: Sequence[str]) -> list[Variant]:
    """One for the bytes of each row named."""
    setting = f"calibrate, plan --size, quantize --calibration; groups of {GROUP}"
    return [
        Variant(
            f"measured, bytes of {row}",
            "kappaquant",
            setting,
            partial(made, row),
            True,
            partial(planned, row),
            partial(unknown, row),
        )
        for row in rows
    ]


def unknown(row: str, bench: Bench) -> str | None:
    """Why there is no size to plan for; None if there is one."""
    return None if row in bench.known() else f"the bytes of {row} are not known; measure it first"


def planned(row: str, bench: Bench) -> Plan:
    """The plan that the evidence predicts to be closest to the original, within the bytes of a row."""
    size = bench.known()[row]
    return bench.plan(policy="sensitivity", sensitivity=bench.evidence, size=size, group_size=GROUP)


def made(row: str, bench: Bench) -> Packed:
    """Quantized by that plan as the command does it with --calibration."""
    folder = bench.work / hashlib.sha256(row.encode()).hexdigest()[:12]
    return quantized(bench.source, planned(row, bench), folder, bench.calibration(), bench.device)
