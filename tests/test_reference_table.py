"""The comparison with other quantizers: plans of equal bytes, rounding, bytes counted, the yardstick and the tables."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import kappaquant
from benchmarks import readme
from benchmarks.reference_ablation import TOLERANCE, Deciding, equal_bytes
from benchmarks.reference_measure import Reading, Yardstick, answered, kld_difference
from benchmarks.reference_peers import PEERS, Peer, Weights, round_to_nearest
from benchmarks.reference_table import MODEL, OWN, RECIPES, peer_rows
from kappaquant.evaluate import ExactMatch
from kappaquant.files.safetensors import TensorInfo
from kappaquant.planning import profile as scanner
from kappaquant.planning.plan import KEPT

SEEDS = range(10)


@pytest.fixture(scope="module")
def deciding() -> Deciding:
    source = kappaquant.open_source(MODEL)
    kappa = {name: k for name, k in scanner.scan(source, jobs=1).kurtosis().items() if k is not None}
    base = kappaquant.make_plan(source.tensors, source.config, "uniform", bits=3)
    return Deciding(base, source.tensors, source.config, kappa)


@pytest.fixture(scope="module")
def yardstick() -> Iterator[Yardstick]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the benchmark does
    yield Yardstick(MODEL, texts=3, asked=4)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("recipe", RECIPES)
def test_plans_of_equal_bytes(deciding: Deciding, recipe: str) -> None:
    by_role = kappaquant.make_plan(deciding.tensors, deciding.config, "recipe", recipe=recipe)
    budget = deciding.nbytes(by_role)
    plans = [deciding.by_kappa(budget), *(deciding.at_random(budget, seed) for seed in SEEDS)]
    sizes = [deciding.nbytes(plan) for plan in plans]
    assert equal_bytes(sizes, budget)
    assert max(sizes) <= budget
    decided = set(deciding.names)
    for plan in plans:
        plan.check(deciding.tensors, deciding.config)
        assert {n for n, choice in plan.choices.items() if choice.format != KEPT} <= decided
    assert len({tuple(plan.bits(name) for name in deciding.names) for plan in plans}) == len(plans)


def test_scaled_thresholds_at_its_own_size_are_the_policy(deciding: Deciding) -> None:
    policy = kappaquant.make_plan(deciding.tensors, deciding.config, "kurtosis", profile=deciding.kappa)
    found = deciding.by_kappa(deciding.nbytes(policy))
    assert {n: c.format for n, c in found.choices.items()} == {n: c.format for n, c in policy.choices.items()}


def test_more_kurtosis_never_gets_fewer_bits_when_all_steps_fit(deciding: Deciding) -> None:
    policy = deciding.by_kappa(deciding.nbytes(deciding.by_kappa(4_337_840)))
    ordered = sorted(deciding.names, key=deciding.kappa.__getitem__)
    bits = [policy.bits(name) for name in ordered]
    assert bits == sorted(bits)


def test_random_assignments_are_their_seed(deciding: Deciding) -> None:
    first, again, other = (deciding.at_random(4_000_000, seed) for seed in (3, 3, 4))
    assert first == again
    assert first.choices != other.choices


@pytest.mark.parametrize(
    ("sizes", "equal"), [([1000, 995], True), ([1000, 994], False), ([1005], True), ([1006], False)]
)
def test_what_equal_bytes_means(sizes: list[int], equal: bool) -> None:
    assert TOLERANCE == 0.005
    assert equal_bytes(sizes, 1000) is equal


def test_rounding_known_answer() -> None:
    row = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0] * 16)  # 3 bits: scale 1, zero 0: nothing to round
    made, nbytes = round_to_nearest(torch.stack([row, row - 3, row / 2]), 3)
    assert torch.equal(made, torch.stack([row, row - 3, row / 2]))
    assert nbytes == -(-3 * (128 * 3 + 16 + 3) // 8)
    coarse, _ = round_to_nearest(torch.tensor([0.0, 0.4, 0.6, 3.0] * 32)[None], 2)
    assert torch.equal(coarse, torch.tensor([0.0, 0.0, 1.0, 3.0] * 32)[None])


@pytest.mark.parametrize("bits", [3, 4])
def test_rounding_stays_within_half_a_step(bits: int) -> None:
    weight = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0))
    weight[0, 0, :128] = 0
    weight[0, 1] += 10  # far from zero on one side: zero stays representable
    made, nbytes = round_to_nearest(weight, bits)
    groups, back = weight.unflatten(-1, (-1, 128)), made.unflatten(-1, (-1, 128))
    span = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    # half a step of the value, and as much of the zero point; float16 scales are off by 2^-11
    assert bool(((groups - back).abs().amax(-1) <= span / (2**bits - 1) * 1.0 + span * 2**-10).all())
    assert bool((made[0, 0, :128] == 0).all())
    assert nbytes == (weight.numel() * bits + 20 * (16 + bits) + 7) // 8


def test_bytes_count_everything() -> None:
    infos = {
        name: TensorInfo(name, "BF16", shape) for name, shape in {"head": (8, 4), "norm": (4,), "w": (2, 16)}.items()
    }
    weights = Weights.of({"w": (torch.zeros(2, 16), 13)}, infos)
    assert (weights.nbytes, weights.quantized, weights.weights) == (2 * 32 + 2 * 4 + 13, 32, 68)
    assert weights.bits_per_weight == 8 * 85 / 68
    with pytest.raises(ValueError, match=r"w: \[16, 2\] for"):
        Weights.of({"w": (torch.zeros(16, 2), 13)}, infos)


def test_yardstick_reads_itself_as_zero_and_takes_weights_off_again(yardstick: Yardstick) -> None:
    itself = yardstick.read({}).figures()
    assert abs(itself["kld_nats"]["mean"]) < 1e-7
    assert itself["kld_nats"]["top1_agreement"] == 1
    name = "model.layers.3.self_attn.o_proj.weight"
    without = {name: torch.zeros_like(yardstick.model.state_dict()[name])}
    broken = yardstick.read(without)
    assert broken.figures()["kld_nats"]["mean"] > 0.01
    assert yardstick.read({}).figures() == itself
    assert yardstick.answers({}).share == 1
    assert sum(map(len, broken.kld)) == yardstick.tokens


def test_paired_difference() -> None:
    def reading(*values: float) -> Reading:
        return Reading([np.full(5, v) for v in values], [np.ones(5)] * len(values), [np.ones(5)] * len(values))

    found = kld_difference(reading(3, 5, 9), reading(1, 3, 7))
    assert (found.value, found.interval_95) == (2, (2, 2))


def test_answers_are_paired_with_the_original() -> None:
    original, variant = (
        ExactMatch(("",) * 4, (True, True, True, False)),
        ExactMatch(("",) * 4, (True, False, False, True)),
    )
    found = answered(variant, original)
    assert (found["correct"], found["of"], found["only_original"], found["only_variant"]) == (2, 4, 2, 1)
    assert found["mcnemar_p"] == 1


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_peer_packs_a_matrix(peer: Peer) -> None:
    if not importlib.util.find_spec(peer.package):
        pytest.skip(f"{peer.package} is not installed: pip install '.[peers]'")
    matrices = torch.randn(3, 32, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    ((made, nbytes),) = peer.experts({"layer.experts.down_proj": matrices, "layer.o_proj": matrices}).values()
    assert made.shape == matrices.shape
    error = (made.float() - matrices.float()).pow(2).sum() / matrices.float().pow(2).sum()
    assert 0.001 < error < (0.1 if "3" in peer.name else 0.02)
    assert 3 < 8 * nbytes / matrices.numel() < 5


def test_an_absent_peer_is_a_row_that_says_so() -> None:
    class Absent(type(PEERS[0])):  # type: ignore[misc]
        package = "a-package-that-nobody-has"

    (row,) = peer_rows(None, Absent())  # type: ignore[arg-type]
    assert row["absent"] == "a-package-that-nobody-has not installed"


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return readme.result("reference_table")


def test_result_says_what_it_ran_on(measured: dict[str, Any]) -> None:
    about = measured["environment"]
    for key in ("device", "cpu", "cores", "python", "torch", "transformers", "kappaquant", "commit"):
        assert about[key], key
    assert about["peers"].keys() == {peer.package for peer in PEERS}


def test_result_has_every_row(measured: dict[str, Any], deciding: Deciding) -> None:
    weights = sum(info.numel for info in deciding.tensors.values())
    rows = {row["name"]: row for row in measured["rows"]}
    assert len(rows) == len(measured["rows"])
    present = [peer for peer in PEERS if "absent" not in rows[peer.name]]
    assert set(rows) == {
        "bf16", *OWN, "RTN int3 g128", "RTN int4 g128", *(p.name for p in PEERS), *(f"{p.name} + experts" for p in present)
    }  # fmt: skip
    for row in rows.values():
        if "absent" not in row:
            low, high = row["kld_nats"]["interval_95"]
            assert low <= row["kld_nats"]["mean"] <= high, row["name"]
            assert 8 * row["bytes"] / row["bits_per_weight"] == pytest.approx(weights, rel=1e-5), row["name"]


def test_sizes_in_the_result_are_those_of_the_plans(measured: dict[str, Any], deciding: Deciding) -> None:
    rows = {row["name"]: row for row in measured["rows"]}
    for name, options in OWN.items():
        plan = kappaquant.make_plan(deciding.tensors, deciding.config, profile=deciding.kappa, **options)
        assert rows[name]["bytes"] == deciding.nbytes(plan), name


def test_ablation_compares_equal_bytes(measured: dict[str, Any]) -> None:
    assert [row["size_of"] for row in measured["ablation"]] == [*RECIPES, "kurtosis"]
    for row in measured["ablation"]:
        assert equal_bytes([row["bytes_least"], row["bytes_most"]], row["bytes"])
        means = [entry["mean"] for entry in row["random"]]
        assert Counter(row["kappa"]["mean"] < mean for mean in means)[True] == row["kappa_beats_random"]
        assert row["random_spread"]["least"] == min(means)


@pytest.mark.parametrize("name", ["reference_table", "ablation"])
def test_blocks_are_tables_of_one_width(name: str) -> None:
    table = [line for line in readme.BLOCKS[name]().splitlines() if line.startswith("|")]
    assert len(table) > 5
    assert len({line.count("|") for line in table}) == 1
