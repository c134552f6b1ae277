"""Scan against direct computation, across cuts, and what it says of odd tensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import EXPERTS, Q, quantize, tensors, write_source

import kappaquant
from kappaquant.commands.plots import kurtosis_by_layer
from kappaquant.files import tensors as stored_tensors
from kappaquant.formats import codec
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.planning.moments import Moments


def heavy(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.exp(0.5 * torch.randn(*shape, generator=generator))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(
        tmp_path / "source", {**tensors(), Q: heavy(0, 300, 512).bfloat16(), EXPERTS: heavy(1, 2, 100, 256)}
    )


@pytest.mark.parametrize("unit", [1 << 23, 20_000])
@pytest.mark.parametrize("name", [Q, EXPERTS])
def test_statistics(source: Path, name: str, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_tensors, "SLICE_ELEMENTS", unit)
    opened = kappaquant.open_source(source)
    stats = kappaquant.scan(opened).tensors[name]
    weight = opened.read(name).double().numpy()
    centred = weight - weight.mean()
    assert stats.kurtosis == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2 - 3, rel=1e-9)
    assert stats.absmax_over_sigma == pytest.approx(np.abs(weight).max() / weight.std(), rel=1e-9)
    energies = np.sort(weight**2)[::-1]
    count = 0.001 * len(energies)
    top = energies[: int(count)].sum() + (count - int(count)) * energies[int(count)]
    assert stats.top_energy == pytest.approx(top / energies.sum(), rel=1e-9 if name == Q else 5e-3)
    matrix = opened.read(name).view(opened.tensors[name].shape)
    for bits in (2, 3, 8):
        expected = codec.encode(matrix, CodebookFormat(bits, 128), "fast").relative_mse
        assert stats.relative_mse[bits] == pytest.approx(expected, rel=1e-5)


def test_profile_round_trip_and_families(source: Path, tmp_path: Path) -> None:
    profile = kappaquant.scan(kappaquant.open_source(source), bits=[3])
    (tmp_path / "profile.json").write_text(profile.to_json())
    assert kappaquant.Profile.load(tmp_path / "profile.json") == profile
    family = profile.families()["routed gate_proj / up_proj"]
    members = [s.kurtosis for s in profile.tensors.values() if s.family == "routed gate_proj / up_proj"]
    assert family.tensors == len(members) == 3
    assert family.mean_kurtosis == pytest.approx(np.mean(members))
    assert family.max_kurtosis == max(members)


def test_a_plan_follows_the_profile(source: Path) -> None:
    opened = kappaquant.open_source(source)
    profile = kappaquant.scan(opened, bits=[])
    plan = kappaquant.make_plan(
        opened.tensors, opened.config, "kurtosis", profile=profile.kurtosis(), thresholds=[1, 4, 100]
    )
    kappa = profile.tensors[Q].kurtosis
    assert kappa is not None
    assert 4 < kappa < 100
    assert plan.bits(Q) == 5
    assert plan.bits("model.layers.0.self_attn.o_proj.weight") == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_reported(bad: float, tmp_path: Path) -> None:
    content = tensors()
    content[Q][3, 3] = bad
    stats = kappaquant.scan(kappaquant.open_source(write_source(tmp_path / "source", content))).tensors
    assert not stats[Q].finite
    assert stats[Q].kurtosis is None
    assert all(s.finite for name, s in stats.items() if name != Q)


def test_odd_tensors(source: Path) -> None:
    stats = kappaquant.scan(kappaquant.open_source(source)).tensors
    assert "model.steps" not in stats
    assert stats["model.layers.3.self_attn.q_proj.weight"].kurtosis is None
    assert stats["model.norm.weight"].relative_mse == {}
    assert stats["model.scalar"].kurtosis == 0.0


def test_plot(source: Path, tmp_path: Path) -> None:
    kurtosis_by_layer(kappaquant.scan(kappaquant.open_source(source), bits=[]), tmp_path / "kappa.png", {"4 bits": 4.0})
    assert (tmp_path / "kappa.png").read_bytes().startswith(b"\x89PNG")


def test_a_profile_of_another_kind_is_refused(tmp_path: Path) -> None:
    for text, message in (("{}", "profile_version None"), ("[]", "list"), ('{"profile_version": 1}', "not a profile")):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(kappaquant.PlanError, match=message):
            kappaquant.Profile.load(tmp_path / "p.json")


def test_moments_of_parts_add_up() -> None:
    weight = heavy(2, 5000) + 0.3
    whole = Moments.of(weight)
    parts = Moments.of(weight[:1234]) + Moments.of(weight[1234:])
    assert parts.kurtosis == pytest.approx(whole.kurtosis, rel=1e-10)
    assert parts.std == pytest.approx(float(weight.double().std(correction=0)), rel=1e-10)
    assert parts.absmax == float(weight.abs().max())
    assert not (parts + Moments.of(torch.tensor([float("nan")]))).finite
    assert Moments.of(torch.full((100,), 0.1)).kurtosis == 0.0


def test_an_error_is_measured_over_all_parts_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_tensors, "SLICE_ELEMENTS", 256)
    for row in (0, 1, 2):  # a norm beyond float16 in the first, a middle, and the last part
        weight = heavy(0, 3, 256)
        weight[row] *= 1e6
        folder = write_source(tmp_path / f"source{row}", {Q: weight})
        stats = kappaquant.scan(kappaquant.open_source(folder), bits=[3]).tensors[Q]
        assert stats.finite
        assert stats.relative_mse == {}


@pytest.mark.parametrize("size", [1e-300, 1e-100, 1e100, 1e300])
def test_magnitudes_that_float64_cannot_raise_to_the_fourth(size: float, tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", {**tensors(), "model.x": torch.randn(10).double() * size})
    stats = kappaquant.scan(kappaquant.open_source(folder), bits=[]).tensors["model.x"]
    assert (stats.kurtosis, stats.finite) == (None, True)
    checkpoint = quantize(folder, tmp_path / "out")
    strict = json.loads(
        (checkpoint.path / "kappaquant.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert "kurtosis" not in strict["tensors"]["model.x"]


def test_jobs_and_devices_that_are_not_possible(source: Path) -> None:
    opened = kappaquant.open_source(source)
    with pytest.raises(kappaquant.PlanError, match="jobs = 0"):
        kappaquant.scan(opened, jobs=0)
    with pytest.raises(kappaquant.UnsupportedError, match="cuda:99"):
        kappaquant.scan(opened, device="cuda:99")
    with pytest.raises(kappaquant.UnsupportedError, match="cuda:99"):
        kappaquant.Options(device="cuda:99")
