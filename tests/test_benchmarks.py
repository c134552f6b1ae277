"""The numbers that README shows are those in benchmarks/results/, and the results keep their bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kappaquant.format import BITS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["codec_error", "demo", "plan_sizes", "quantize_cost"])
def test_results_say_what_they_ran_on(name: str) -> None:
    about = result(name)["environment"]
    for key in ("device", "cpu", "cores", "python", "torch", "transformers", "kappaquant", "commit"):
        assert about[key], f"{name}.json: {key}"


def test_codec_error_keeps_its_bounds_and_stands_in_readme() -> None:
    entries = result("codec_error")["results"]
    assert [entry["bits"] for entry in entries] == list(BITS)
    for entry in entries:
        fast, best = entry["fast"]["relative_mse"], entry["best"]["relative_mse"]
        assert best < fast
        assert entry["bound"] is None or best <= entry["bound"]
        assert f"| {entry['bits']} | {entry['bits_per_weight']} | {fast:.5f} | {best:.5f} |" in README


def test_readme_shows_the_demo() -> None:
    variants = result("demo")["variants"]
    assert [v["name"] for v in variants] == ["bf16", "uniform 2", "uniform 3", "recipe apex2", "kurtosis"]
    for v in variants:
        kld, match = v.get("kld_nats"), v["exact_match"]
        cells = (
            v["name"], f"{v['bytes'] / 1e6:.2f}", f"{v['bits_per_weight']:.2f}",
            f"{kld['mean']:.5f} ± {kld['mean_error']:.5f}" if kld else "–", f"{v['perplexity']['value']:.3f}",
            f"{match['share']:.1%}", " – ".join(f"{bound:.1%}" for bound in match["wilson_95"]),
        )  # fmt: skip
        assert f"| {' | '.join(cells)} |" in README


def test_readme_shows_the_sizes() -> None:
    for name, sizes in result("plan_sizes")["plans"].items():
        kept, packed = sizes["mtp_kept"], sizes["mtp_experts_4_bits"]
        cells = (
            name, f"{kept['bytes'] / 1e9:.2f}", f"{kept['bits_per_weight']:.2f}",
            f"{kept['active_bytes_per_token'] / 1e9:.2f}", f"{packed['bytes'] / 1e9:.2f}",
        )  # fmt: skip
        assert f"| {' | '.join(cells)} |" in README


def test_readme_states_the_cost() -> None:
    cost = {entry["effort"]: entry for entry in result("quantize_cost")["results"]}
    for entry in cost.values():
        assert entry["peak_gib"] <= entry["bound_gib"]
        assert entry["seconds_per_gb"] <= entry["bound_seconds_per_gb"]
    times = (
        f"{cost['fast']['seconds_per_gb']} s per GB of bf16 with `--effort fast`, {cost['best']['seconds_per_gb']} s"
    )
    assert times in README
    assert f"{max(entry['peak_gib'] for entry in cost.values()):.2f} GiB" in README
