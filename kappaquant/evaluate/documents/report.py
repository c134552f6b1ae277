"""The evaluation of several variants of one model as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kappaquant.evaluate.measures.divergence import Divergence, Perplexity
from kappaquant.evaluate.measures.tasks import ExactMatch, paired


@dataclass(frozen=True)
class Variant:
    """What is known of one variant.

    Attributes:
        nbytes: bytes of its weight files; bits_per_weight: 8 * bytes of its tensors / weights.
        divergence: from the original; None for the original itself.
    """

    name: str
    nbytes: int
    bits_per_weight: float
    perplexity: Perplexity
    exact_match: ExactMatch | None = None
    divergence: Divergence | None = None


def json_report(variants: Sequence[Variant], about: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values: ``about`` (what was measured, on what), every variant, and every pair on the same questions."""
    asked = [(v.name, v.exact_match) for v in variants if v.exact_match]
    pairs = [
        {"first": one, "second": other, **asdict(paired(first, second))}
        for i, (one, first) in enumerate(asked)
        for other, second in asked[i + 1 :]
    ]
    return rounded({**about, "variants": [_entry(v) for v in variants], "paired_exact_match": pairs})


def _entry(variant: Variant) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": variant.name,
        "bytes": variant.nbytes,
        "bits_per_weight": variant.bits_per_weight,
        "perplexity": asdict(variant.perplexity),
    }
    if variant.divergence:
        found = asdict(variant.divergence)
        del found["perplexity"], found["original_perplexity"]
        entry["kld_nats"] = found
    if variant.exact_match:
        match = variant.exact_match
        entry["exact_match"] = {
            "correct": match.hits, "of": match.n, "share": match.share, "wilson_95": list(match.interval()),
        }  # fmt: skip
    return entry


def rounded(value: Any, digits: int = 6) -> Any:
    """Floats to so many significant digits, all through nested dicts and lists: what was measured holds no more."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
