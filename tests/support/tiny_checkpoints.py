"""Quantized checkpoints of the tiny models."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from choices import choice

import kappaquant


def quantize(source: Path, output: Path, bits: dict[str, int | str] | None = None, **options: Any) -> Path:
    """Uniform 3 bits in groups of 64; ``bits`` maps patterns to other choices or formats by id, even such as policies never make."""
    opened = kappaquant.open_source(source)
    plan = kappaquant.make_plan(opened.tensors, opened.config, policy="uniform", bits=3, group_size=64)
    choices = dict(plan.choices)
    for pattern, chosen in (bits or {}).items():
        matching = [name for name in choices if fnmatch(name, pattern)]
        assert matching, pattern
        choices |= {name: choice(chosen, 64) for name in matching}
    kappaquant.quantize(
        opened, output, dataclasses.replace(plan, choices=choices), kappaquant.Options(effort="fast", jobs=1, **options)
    )
    return output
