"""Budgets as users say them: units, bits per weight, memory that is shared with keys and values."""

from __future__ import annotations

import pytest
from headers import infos

from kappaquant.errors import BudgetError, PlanError
from kappaquant.planning.budgets import fit, parse_size, size_of_bits

GIB = 2**30
CONFIG = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("18GB", 18 * 10**9), ("17.5GiB", 35 * GIB // 2), ("900 MB", 9 * 10**8), ("1kb", 1000), ("1KiB", 1024), ("2TB", 2 * 10**12),
        ("3B", 3), ("1.5TiB", 3 * 2**39), ("0.1GB", 10**8), ("3gib", 3 * GIB), ("2.2GB", 2_200_000_000),
    ],
)  # fmt: skip
def test_sizes_have_units_of_1000_or_1024(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["18", "18000000000", "18G", "18Gi", "18 bytes", "18Gbit", "GB", "-1GB", "1e3GB", "nanGB", "1,5GB", "18b1", ""],
)
def test_a_size_without_a_unit_or_with_a_strange_one_says_which_there_are(text: str) -> None:
    with pytest.raises(
        PlanError, match=r"--active .*: write a number and a unit, such as 18GB.*B, KB, MB, GB and TB of 1000.*KiB"
    ):
        parse_size(text, "--active")


def test_bits_per_weight_are_of_all_weights() -> None:
    tensors = infos({"a": (100, 80), "b": (7,)})
    assert size_of_bits(3.5, tensors) == 8007 * 3.5 // 8
    for bits in (0, -1, float("nan"), float("inf")):
        with pytest.raises(PlanError, match=r"bits per weight = .*: must be a number above 0"):
            size_of_bits(bits, tensors)


def test_memory_is_shared_with_keys_values_and_a_reserve() -> None:
    shared = fit(64 * GIB, 32768, CONFIG)
    assert shared.cache == 32768 * 4 * 2 * 2 * 64 * 2
    assert shared.reserve == 64 * GIB // 20
    assert shared.weights == 64 * GIB - shared.cache - shared.reserve
    assert fit(4 * GIB, 1, CONFIG).reserve == GIB
    for part in (
        "68.72 GB, 64.00 GiB",
        "32,768 tokens take 67.11 MB, 64.00 MiB",
        "3.20 GiB are held in reserve",
        "left for weights",
    ):
        assert part in str(shared)


def test_a_context_that_leaves_nothing_for_weights() -> None:
    with pytest.raises(
        BudgetError,
        match=r"1.00 GiB with a context of 9,000,000 tokens: keys and values take 18.43 GB.*before any weights",
    ):
        fit(GIB, 9_000_000, CONFIG)
    with pytest.raises(PlanError, match="context 0: must be 1 or more tokens"):
        fit(GIB, 0, CONFIG)
