"""Routed experts as layers of vLLM: what they compute, whatever the router names, and what is missing when they load."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm sets up an environment with it")

from vllm.model_executor.layers.fused_moe import layer as vllm_moe
from vllm_layers import MOE, stored

import kappaquant
from kappaquant.engines.vllm.config import KappaquantConfig
from kappaquant.engines.vllm.experts import run
from kappaquant.errors import FormatError, UnsupportedError

pytestmark = pytest.mark.usefixtures("one_process")


def moe(config: KappaquantConfig, **more: Any) -> Any:
    runner = vllm_moe.FusedMoEFactory(
        num_experts=5, top_k=2, hidden_size=128, intermediate_size=128, params_dtype=torch.float32,
        quant_config=config, prefix=f"{MOE}experts", **more,
    )  # fmt: skip
    from vllm.config import get_current_vllm_config

    get_current_vllm_config().compilation_config.static_forward_context.clear()
    return runner.routed_experts


def load_experts(layer: Any, config: KappaquantConfig, without: str = "") -> None:
    for name in config.checkpoint.keys():
        if name.startswith(f"{MOE}experts."):
            for parameter, tensor in stored(config, name):
                key = f"{name}{parameter.removeprefix('weight').replace('_', '.', 1)}"
                if key != without:
                    ending = parameter.removeprefix("weight")
                    list(layer.load_weights([(name.removeprefix(f"{MOE}experts.") + ending, tensor)]))


def test_experts(config: KappaquantConfig) -> None:
    layer = moe(config)
    load_experts(layer, config)
    layer.quant_method.process_weights_after_loading(layer)
    x, ids, weights = torch.randn(4, 128), torch.tensor([[0, 3], [4, 1], [2, 2], [3, 0]]), torch.rand(4, 2)
    expected = torch.zeros(4, 128)
    for token in range(4):
        for slot in range(2):
            gate, up, down = (
                config.checkpoint.dequantize(f"{MOE}experts.{ids[token, slot]}.{part}_proj.weight")
                for part in ("gate", "up", "down")
            )
            inner = torch.nn.functional.silu(x[token] @ gate.t()) * (x[token] @ up.t())
            expected[token] += weights[token, slot] * (inner @ down.t())
    torch.testing.assert_close(layer.quant_method.apply(layer, x, weights, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("local", [None, [0, 1, 2, 3, 4], [2, -1, 0, -1, 1]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_that_are_no_expert_count_nothing(
    config: KappaquantConfig, local: list[int] | None, dtype: torch.dtype
) -> None:
    """Warming up, vLLM routes rows of uninitialised memory; the shares of other cards have -1 in its map."""
    layer = moe(config)
    load_experts(layer, config)
    layer.quant_method.process_weights_after_loading(layer)
    here = list(range(5)) if local is None else local
    layer._expert_map = None if local is None else torch.tensor(local, dtype=torch.int32)
    x, weights = torch.randn(4, 128), torch.rand(4, 2)
    ids = torch.tensor([[0, -1], [5, 4], [2**31 - 1, -(2**31)], [3, 1]], dtype=dtype)
    expected = torch.zeros(4, 128)
    for token, slot in ((0, 0), (1, 1), (3, 0), (3, 1)):
        mine = torch.tensor([[here[ids[token, slot]]]])
        if mine >= 0:
            expected[token] += layer.packed_experts(x[token][None], mine, weights[token, slot].view(1, 1))[0]
    torch.testing.assert_close(run(layer, x, weights, ids), expected)


@pytest.mark.parametrize(
    "ending", ["gate_proj.weight.tq_packed", "up_proj.weight.tq_norms", "down_proj.weight.tq_packed"]
)
def test_an_expert_that_never_came(config: KappaquantConfig, ending: str) -> None:
    layer = moe(config)
    name = f"{MOE}experts.3.{ending}"
    load_experts(layer, config, without=name)
    with pytest.raises(FormatError, match=f"{name}: vLLM's layer .* needs it for expert 3, but was not given it"):
        layer.quant_method.process_weights_after_loading(layer)


def test_an_expert_that_the_checkpoint_does_not_have(config: KappaquantConfig) -> None:
    del config.names[f"{MOE}experts.2.up_proj.weight"]
    with pytest.raises(FormatError, match=rf"{MOE}experts\.2\.up_proj\.weight: vLLM needs it"):
        moe(config)


def test_experts_of_another_shape(config: KappaquantConfig) -> None:
    config.checkpoint = kappaquant.open_checkpoint(config.checkpoint.path)
    entry = config.checkpoint.entries[f"{MOE}experts.1.down_proj.weight"]
    object.__setattr__(entry.info, "shape", (128, 64))
    with pytest.raises(
        FormatError, match=r"experts\.1\.down_proj\.weight: has shape \[128, 64\] .* wants \[128, 128\]"
    ):
        moe(config)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activation": "relu2"}, "their activation is relu2"),
        ({"apply_router_weight_on_input": True}, "the router's weights multiply their inputs"),
        ({"has_bias": True}, "they have biases"),
    ],
)
def test_experts_that_are_not_served(config: KappaquantConfig, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=f"packed experts are not served: {reason}"):
        moe(config, **options)
