"""Plans by measured sensitivity of the real model, each at the bytes of another row: what ``calibrate`` and ``plan --size`` make.

The bytes are those of all tensors, so the embedding shrinks too. Both of a pair are calibrated on the same text, if at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

from benchmarks.real_measure import BOTH, GROUP, Bench, Packed, Variant
from benchmarks.reference_table import quantized
from kappaquant.formats.kinds import CODEBOOK
from kappaquant.planning.plan import Plan

NAMES = {(CODEBOOK,): "measured", BOTH: "measured in both kinds"}
"""What rows are called by the kinds of formats that the evidence is of."""


def variants(rows: Sequence[str]) -> list[Variant]:
    """Two for the bytes of each row named: of codebooks, and of codebooks and trellis codes, as the commands do it."""
    setting = f"calibrate, plan --size, quantize --calibration; groups of {GROUP}"
    return [
        Variant(
            f"{name}, bytes of {row}",
            "kappaquant",
            f"{setting}; formats {','.join(kinds)}",
            partial(made, row, kinds),
            True,
            partial(planned, row, kinds),
            partial(unknown, row),
            kinds=kinds,
        )
        for kinds, name in NAMES.items()
        for row in rows
    ]


def unknown(row: str, bench: Bench) -> str | None:
    """Why there is no size to plan for; None if there is one."""
    return None if row in bench.known() else f"the bytes of {row} are not known; measure it first"


def planned(row: str, kinds: tuple[str, ...], bench: Bench) -> Plan:
    """The plan that the evidence predicts to be closest to the original, within the bytes of a row."""
    size = bench.known()[row]
    return bench.plan(policy="sensitivity", sensitivity=bench.evidence(kinds), size=size, group_size=GROUP)


def made(row: str, kinds: tuple[str, ...], bench: Bench) -> Packed:
    """Quantized by that plan as the command does it with --calibration."""
    folder = bench.work / hashlib.sha256(f"{row}{kinds}".encode()).hexdigest()[:12]
    return quantized(bench.source, planned(row, kinds, bench), folder, bench.calibration(), bench.device)
