"""Evidence without text: the errors that scan finds, in the groups each tensor would have."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch

import kappaquant
from kappaquant.errors import NonFiniteError, PlanError
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.formats.trellis import TrellisFormat
from kappaquant.models.skeleton import load_config, model_class
from kappaquant.planning import profile
from kappaquant.planning.profile import scan
from kappaquant.quantizing.calibration.data_free import of_weights


def test_it_is_what_scan_finds_in_the_groups_of_each_tensor(tmp_path: Path) -> None:
    source = kappaquant.open_source(tiny_models.save_tiny("qwen3_moe", tmp_path / "source", experts="split"))
    seen: list[tuple[int, int]] = []
    found = of_weights(source, jobs=1, device="cpu", report=lambda done, total: seen.append((done, total)))
    groups = {int(fmt.rpartition("g")[2]) for known in found.tensors.values() for fmt in known.errors}
    profiles = {size: scan(source, group_size=size, jobs=1, device="cpu") for size in groups}
    for name, known in found.tensors.items():
        for fmt, error in known.errors.items():
            bits, _, size = fmt.removeprefix("tq").partition("g")
            assert error == profiles[int(size)].tensors[name].relative_mse[int(bits)]
        assert known.energy == source.tensors[name].numel
        assert found.kurtosis[name] == profiles[min(groups)].tensors[name].kurtosis
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert sorted(name for unit in found.units for name in unit.tensors) == sorted(found.tensors)


def test_a_part_loses_its_share_of_weights(tmp_path: Path) -> None:
    source = kappaquant.open_source(tiny_models.save_tiny("llama", tmp_path / "source"))
    found = of_weights(source, 32, jobs=1, device="cpu")
    unit = next(unit for unit in found.units if unit.role == "mlp.down")
    (name,) = unit.tensors
    assert found.loss(unit, {name: "tq4g32"}) == pytest.approx(found.tensors[name].errors["tq4g32"])


def test_a_tensor_that_no_format_holds_is_named(tmp_path: Path) -> None:
    folder = tiny_models.save_tiny("llama", tmp_path / "source")
    model = model_class(load_config(folder)).from_pretrained(folder)
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 3] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: holds NaN or infinity"):
        of_weights(kappaquant.open_source(folder), 32, jobs=1, device="cpu")


def test_trellis_codes_are_measured_where_that_is_asked_for(tmp_path: Path) -> None:
    source = kappaquant.open_source(tiny_models.save_tiny("llama", tmp_path / "source"))
    found = of_weights(source, 64, jobs=1, device="cpu", formats=("k", "t"))
    name = "model.layers.0.mlp.up_proj.weight"
    weight = source.read(name).view(source.tensors[name].shape)
    for fmt in (TrellisFormat(2, 64), CodebookFormat(4, 64)):
        assert found.tensors[name].errors[fmt.id] == pytest.approx(fmt.encode(weight, "fast").relative_mse, rel=1e-4)
    alone = of_weights(source, 64, jobs=1, device="cpu", formats=("t",))
    assert alone.tensors[name].errors == {
        fmt: error for fmt, error in found.tensors[name].errors.items() if fmt in ("t2g64", "t3g64", "t4g64")
    }
    assert {unit.kind for unit in alone.units} == {"t"}
    with pytest.raises(PlanError, match="formats 'x': must be letters"):
        of_weights(source, 64, formats=("x",))


def test_only_what_plans_decide_is_read_and_each_tensor_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = kappaquant.open_source(tiny_models.save_tiny("qwen3_moe", tmp_path / "source", experts="split"))
    tasks: list[profile._Task] = []
    measure = profile._measure
    monkeypatch.setattr(profile, "_measure", lambda task: tasks.append(task) or measure(task))
    found = of_weights(source, jobs=1, device="cpu")
    assert sorted(task.entry.info.name for task in tasks) == sorted(found.tensors)
    assert len({fmt.group_size for task in tasks for fmt in task.formats}) > 1
    assert all(len(task.formats) == 7 for task in tasks)
