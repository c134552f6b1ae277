"""Routed experts in vLLM: the modules of ``kappaquant.runtime.experts``, filled with a rank's share of a layer's experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.engines.vllm.activations import CHOSEN
from kappaquant.engines.vllm.linear import (
    Loader,
    Weight,
    add_placeholder,
    check_share,
    columns_of,
    empty_weight,
    endings,
    part_dtype,
    tensor_of,
)
from kappaquant.errors import FormatError, UnsupportedError
from kappaquant.runtime.experts import ExpertBlock, ExpertWeights, QuantExperts
from kappaquant.runtime.packed import SharedInput

_ACTIVATIONS: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
    MoEActivation.SILU: nn.functional.silu,
    MoEActivation.GELU: nn.functional.gelu,
}
_PLACEHOLDERS = ("w13_weight", "w2_weight")


class ExpertsMethod(FusedMoEMethodBase):
    """The routed experts of one layer, at least one matrix of which is packed.

    Args:
        names: name below the layer, such as "gate_up_proj" or "7.down_proj.weight" -> name in the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str], moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        self.checkpoint = checkpoint
        self.names = names
        self._captured = get_current_vllm_config().compilation_config.cudagraph_mode != CUDAGraphMode.NONE

    @property
    def topk_indices_dtype(self) -> torch.dtype:
        """What the router is to write ids in: the kernels', so that nothing converts them."""
        return torch.int64

    def get_fused_moe_quant_config(self, layer: nn.Module) -> FusedMoEQuantConfig | None:
        return None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        self._refuse(layer)
        layer.filling = filling = _Filling(self, layer, hidden_size, intermediate_size_per_partition)
        gate_up = filling.projection(("w1", "w3"), params_dtype)
        down = filling.projection(("w2",), params_dtype)
        experts = QuantExperts(gate_up, down, _ACTIVATIONS[layer.activation], SharedInput(CHOSEN))
        layer.packed_experts = experts.to_empty(device=torch.get_default_device())
        layer.endings = endings(self.checkpoint, self.names.values())
        for ending, suffix in layer.endings.items():
            dtype = part_dtype(self.checkpoint, self.names.values(), suffix) or params_dtype
            for name in _PLACEHOLDERS:
                add_placeholder(layer, f"{name}{ending}", dtype, ExpertLoader(layer, suffix))

    def process_weights_after_loading(self, layer: Any) -> None:
        if layer.filling is None:
            return
        layer.filling.check()
        layer.filling = None
        for name in _PLACEHOLDERS:
            for ending in layer.endings:
                delattr(layer, f"{name}{ending}")
        for projection in (layer.packed_experts.gate_up_proj, layer.packed_experts.down_proj):
            for block in projection.blocks:
                block.finish()
        self._refuse_capture(layer)

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        if torch.compiler.is_compiling():  # on a CPU; on GPUs vLLM calls this from an op of its own
            return _routed_experts(x, topk_weights, topk_ids, layer.layer_name)
        return run(layer, x, topk_weights, topk_ids)

    def _refuse(self, layer: Any) -> None:
        """Raise UnsupportedError for what vLLM can do with routed experts and packed ones can not."""
        reason = ""
        if layer.activation not in _ACTIVATIONS or layer.swiglu_limit is not None:
            reason = f"their activation is {layer.activation.value}"
        elif layer.apply_router_weight_on_input:
            reason = "the router's weights multiply their inputs"
        elif self.moe.has_bias:
            reason = "they have biases"
        elif self.moe.moe_parallel_config.use_all2all_kernels:
            reason = "with data parallelism vLLM sends tokens between cards in a way of its own; use tensor parallelism"
        if reason:
            raise UnsupportedError(f"{layer.layer_name}: packed experts are not served: {reason}")

    def _refuse_capture(self, layer: Any) -> None:
        """What runs in torch looks at the routing on the host: no CUDA graph can hold that."""
        experts = layer.packed_experts
        device = next(experts.buffers()).device
        if device.type == "cpu" or not self._captured or not experts.waits_for_host():
            return
        raise UnsupportedError(
            f"{layer.layer_name}: no GPU kernel takes these experts as they are stored, and a CUDA graph cannot hold what runs "
            "instead; pass --enforce-eager, which is slow"
        )


def run(layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """x [tokens, hidden] through this rank's share of each token's experts, weighted and added: [tokens, hidden]."""
    ids = topk_ids.long()
    here = layer.expert_map
    if here is not None:  # -1 for experts of other ranks, which count nothing here, as ids that are none do
        known = (ids >= 0) & (ids < len(here))
        ids = here[ids.clamp(0, len(here) - 1)].long().masked_fill(~known, -1)
    return layer.packed_experts(x, ids, topk_weights)


@torch.library.custom_op("kappaquant::routed_experts", mutates_args=())
def _routed_experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    return run(get_forward_context().no_compile_layers[layer_name].routed_experts, x, topk_weights, topk_ids)


@_routed_experts.register_fake
def _(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)


class ExpertLoader(Loader):
    """The ``weight_loader`` of an expert placeholder: vLLM hands it one matrix of one expert at a time."""

    def __call__(  # type: ignore[override]
        self,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        layer: Any = self._layer()
        assert layer is not None
        taken = layer.filling.fill(self.suffix, loaded_weight, shard_id, expert_id)
        return taken if return_success else None


@dataclass(frozen=True)
class _Place:
    """Rows of one expert in a weight [experts, n, in], which come from the checkpoint tensor ``name``."""

    weight: Weight
    slot: int
    rows: slice
    name: str


class _Filling:
    """The experts of one layer while they are filled, and which of them are."""

    def __init__(self, method: ExpertsMethod, layer: Any, hidden: int, inner: int) -> None:
        self._checkpoint, self._names, self._layer_name = method.checkpoint, method.names, layer.layer_name
        parallel = layer.moe_config.moe_parallel_config
        self._rank, self._cards = parallel.tp_rank, parallel.tp_size
        self._hidden, self._inner = hidden, inner
        self._files = {"w1": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name, "w3": layer.ckpt_up_proj_name}
        self._local = layer.expert_map_manager.map_global_to_local
        self._experts = layer.global_num_experts
        self._places: dict[tuple[int, str], _Place] = {}
        self._filled: set[tuple[int, str, str]] = set()
        self._suffixes = list(endings(method.checkpoint, method.names.values()).values())

    def projection(self, shards: Sequence[str], dtype: torch.dtype) -> ExpertWeights:
        """Room for one projection of all experts of this rank; ``shards`` are its parts, one below the other."""
        width = self._inner if "w2" in shards else self._hidden
        rows = self._hidden if "w2" in shards else self._inner
        members: dict[tuple[Any, ...], list[tuple[int, int, list[tuple[str, str]]]]] = defaultdict(list)
        count = 0
        for expert in range(self._experts):
            if (local := self._local(expert)) == -1:
                continue
            count += 1
            for first, run in self._runs(expert, shards):
                key: tuple[Any, ...] = (first * rows, len(run) * rows, self._checkpoint.format_of(run[0][1]))
                members[key].append((local, expert, run))
        blocks = []
        for (row, height, _), held in members.items():
            name = held[0][2][0][1]
            weight = empty_weight(self._checkpoint, name, (len(held), height, width), dtype, "meta", ("grouped",))
            blocks.append(ExpertBlock(weight, [local for local, _, _ in held], row, count))
            for slot, (_, expert, run) in enumerate(held):
                for at, (shard, name) in enumerate(run):
                    self._places[expert, shard] = _Place(weight, slot, slice(at * rows, (at + 1) * rows), name)
        return ExpertWeights(blocks, rows * len(shards))

    def _runs(self, expert: int, shards: Sequence[str]) -> list[tuple[int, list[tuple[str, str]]]]:
        """(number of the first shard, its and its neighbours' names) for shards of one expert that are stored alike."""
        runs: list[tuple[int, list[tuple[str, str]]]] = []
        for number, shard in enumerate(shards):
            name = self._name(expert, shard)
            if runs and self._checkpoint.format_of(runs[-1][1][-1][1]) == self._checkpoint.format_of(name):
                runs[-1][1].append((shard, name))
            else:
                runs.append((number, [(shard, name)]))
        return runs

    def _name(self, expert: int, shard: str) -> str:
        """The checkpoint's name of one matrix, whose shape is checked; of all experts' if they are stored as one."""
        single = f"{expert}.{self._files[shard]}.weight"
        fused = self._files["w2"] if shard == "w2" else "gate_up_proj"
        rows, width = self._hidden, self._inner * self._cards
        if shard != "w2":
            rows, width = width, rows
        if single in self._names:
            name = self._names[single]
            shape: tuple[int, ...] = (rows, width)
        elif fused in self._names:
            name, shape = self._names[fused], (self._experts, rows if shard == "w2" else 2 * rows, width)
        else:
            raise FormatError(
                f"{self._layer_name}.{single}: vLLM needs it, but {self._checkpoint.path} has neither it nor {fused}"
            )
        if self._checkpoint.shape(name) != shape:
            raise FormatError(
                f"{name}: has shape {list(self._checkpoint.shape(name))} in {self._checkpoint.path}, but vLLM's layer "
                f"{self._layer_name} wants {list(shape)}"
            )
        if shard == "w2":
            check_share(self._checkpoint, name, width, self._inner)
        return name

    def fill(self, suffix: str, loaded: Tensor, shard: str, expert: int) -> bool:
        """Copy this rank's share of one expert's matrix; False if the expert is another rank's."""
        if self._local(expert) == -1:
            return False
        place = self._places[expert, shard]
        target = tensor_of(place.weight, suffix)
        stored = place.name + suffix
        if target is None or (expert, shard, suffix) in self._filled:
            raise FormatError(
                f"{stored}: met while vLLM loads {self._layer_name}, which has no place for it (any more)"
            )
        share = slice(self._rank * self._inner, (self._rank + 1) * self._inner)
        values = loaded[:, columns_of(share, place.weight, suffix)] if shard == "w2" else loaded[share]
        target = target[place.slot, place.rows]
        if values.shape != target.shape:
            raise FormatError(
                f"{stored}: a share of {list(values.shape)}, vLLM's layer {self._layer_name} takes {list(target.shape)}"
            )
        target.copy_(values)
        self._filled.add((expert, shard, suffix))
        return True

    def check(self) -> None:
        """Raise FormatError, naming the tensor, unless every expert was filled."""
        for (expert, shard), place in self._places.items():
            for suffix in self._suffixes:
                if tensor_of(place.weight, suffix) is not None and (expert, shard, suffix) not in self._filled:
                    raise FormatError(
                        f"{place.name}{suffix}: vLLM's layer {self._layer_name} needs it for expert {expert}, "
                        "but was not given it"
                    )
