"""What of a layer is rounded for the same inputs, what messages call it, and what its experts are rounded for."""

from __future__ import annotations

from pathlib import Path

import tiny_models
import torch

import kappaquant
from kappaquant.formats.codebook import CodebookFormat
from kappaquant.quantizing.calibration.layers import Layers
from kappaquant.quantizing.calibration.moments import watched
from kappaquant.quantizing.calibration.tasks import Task, moments_of, packable, tasks_of

FMT = CodebookFormat(3, 32)


def test_a_matrix_has_the_name_of_its_tensor_or_of_its_expert() -> None:
    linear = Task(["q", "k"], FMT, "attention", "weight", None)
    stacked = Task(["experts.gate_up_proj"], FMT, "experts", "gate_up_proj", [0, 1, 2])
    split = Task(["experts.5.up_proj", "experts.7.up_proj"], FMT, "experts", "gate_up_proj", [5, 7])
    assert linear.label(0) == "q, k"
    assert [stacked.label(at) for at in (0, 2)] == ["experts.gate_up_proj[0]", "experts.gate_up_proj[2]"]
    assert [split.label(at) for at in (0, 1)] == split.names


def test_layers_that_read_the_same_are_one_task_and_experts_have_their_own_inputs(tmp_path: Path) -> None:
    source = kappaquant.open_source(tiny_models.save_tiny("qwen3_moe", tmp_path / "source", experts="split"))
    layers, formats = (
        Layers(source, "cpu", torch.float32),
        {n: FMT for n in source.tensors if n.endswith("_proj.weight")},
    )
    (state,), calls = layers.embed(torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0)))
    layers.load(0)
    packed = packable(layers, formats, 0)
    with watched({path: layers.model.get_submodule(path) for path in set(packed.values())}) as (sums, routed):
        list(layers.forward(0, [state], calls))
    tasks = tasks_of(layers, formats, packed, sums)
    assert sorted(name for task in tasks for name in task.names) == sorted(packed)
    roles = {tuple(sorted({name.split(".")[-2] for name in task.names})) for task in tasks}
    assert roles == {("k_proj", "q_proj", "v_proj"), ("o_proj",), ("gate_proj",), ("up_proj",), ("down_proj",)}
    gates = next(task for task in tasks if task.names[0].endswith("gate_proj.weight"))
    assert gates.experts is not None
    seen = [moments_of(gates, sums, routed)(at) for at in range(len(gates.experts))]
    top_k = 2
    assert sum(one.own.count for one in seen) == 32 * top_k
    for one in seen:  # drawn towards the layer's, which is positive definite where an expert's own is not
        assert (one.drawn.diagonal() > 0).all()
        assert not torch.equal(one.drawn, one.own.gram)
