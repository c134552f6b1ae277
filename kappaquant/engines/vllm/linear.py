"""Linear layers, the head and embeddings in vLLM whose weights are packed, or partly kept beside packed ones.

vLLM stores q/k/v, gate/up and GatedDeltaNet's projections as one matrix each, and cuts it over cards. Which rows of which
checkpoint tensor a rank holds is asked of vLLM's own loader, so that every way it has of sharing out heads is followed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.engines.vllm.activations import CHOSEN
from kappaquant.errors import FormatError, UnsupportedError
from kappaquant.files.tensors import TORCH_DTYPES
from kappaquant.kernels import dispatch
from kappaquant.kernels.base import Use
from kappaquant.models.sharding import sizes
from kappaquant.runtime.experts import KeptWeight
from kappaquant.runtime.packed import PackedWeight

Weight = PackedWeight | KeptWeight


@dataclass(frozen=True)
class Rows:
    """Rows [start, start + count) of a rank's matrix, which come from the checkpoint tensor ``name``."""

    name: str
    start: int
    count: int


class LinearMethod(LinearMethodBase):
    """A matrix that some checkpoint tensors fill, one below the other; at least one of them is packed."""

    def __init__(self, checkpoint: Checkpoint, names: Sequence[str], prefix: str) -> None:
        self.checkpoint = checkpoint
        self.names = names
        self.prefix = prefix

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        rows = self._rows(layer, output_partition_sizes, input_size)
        for name in self.names:
            check_share(self.checkpoint, name, input_size, input_size_per_partition)
        device = torch.get_default_device()
        layer.parts = nn.ModuleList()
        for name, count in _runs(self.checkpoint, rows):
            shape = (count, input_size_per_partition)
            layer.parts.append(empty_weight(self.checkpoint, name, shape, params_dtype, device))
        first = layer.tp_rank * input_size_per_partition if input_size_per_partition < input_size else 0
        columns = slice(first, first + input_size_per_partition)
        layer.filling = _Filling(self, layer, rows, attributes["weight_loader"], columns)
        layer.endings = endings(self.checkpoint, self.names)
        for ending, suffix in layer.endings.items():
            dtype = part_dtype(self.checkpoint, self.names, suffix) or params_dtype
            add_placeholder(layer, f"weight{ending}", dtype, Loader(layer, suffix))

    def process_weights_after_loading(self, layer: Any) -> None:
        if layer.filling is None:
            return
        layer.filling.check()
        layer.filling = None
        for ending in layer.endings:
            delattr(layer, f"weight{ending}")
        for part in layer.parts:
            part.finish()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return multiply(x, layer.parts, bias)

    def _rows(self, layer: Any, shares: Sequence[int], input_size: int) -> list[Rows]:
        """Which tensor fills which rows: vLLM's logical parts in order, one tensor for one or several of them."""
        whole = _whole_rows(layer)
        found, at, part = [], 0, 0
        for name in self.names:
            height, width = self.checkpoint.shape(name)
            first = part
            while part < len(whole) and sum(whole[first:part]) < height:
                part += 1
            if sum(whole[first:part]) != height or width != input_size:
                raise FormatError(
                    f"{name}: has shape {[height, width]} in {self.checkpoint.path}, but vLLM's layer {self.prefix} has "
                    f"{input_size} inputs and parts of {whole[first:]} rows for it"
                )
            for share in shares[first:part]:
                found.append(Rows(name, at, share))
                at += share
        if part != len(whole):
            raise FormatError(
                f"{self.prefix}: vLLM's layer has parts of {whole} rows, {', '.join(self.names)} fill {part} of them"
            )
        return found


class EmbeddingMethod(LinearMethod):
    """A packed embedding, and a packed head, whether it has its own weight or is tied to the embedding."""

    def create_weights(self, layer: Any, *args: Any, **attributes: Any) -> None:
        super().create_weights(layer, *args, **attributes)
        for part in layer.parts:  # rows that pad the vocabulary are never filled: they are zero
            for buffer in part.buffers():
                buffer.zero_()
            if isinstance(part, PackedWeight) and not isinstance(layer, ParallelLMHead):
                part.serve("rows")

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        (weight,) = layer.parts
        return weight.rows(ids).to(layer.params_dtype)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        layer.parts, layer.filling = embed_tokens.parts, None
        return layer


class Loader:
    """The ``weight_loader`` of a placeholder: hands what vLLM read to the layer's filling. Holds its layer weakly."""

    def __init__(self, layer: Any, suffix: str) -> None:
        self._layer = weakref.ref(layer)
        self.suffix = suffix

    def __call__(self, parameter: nn.Parameter, loaded: Tensor, shard_id: Any = None) -> None:
        layer: Any = self._layer()
        assert layer is not None
        layer.filling.fill(self.suffix, loaded, shard_id)


class _Filling:
    """The parts of one layer while they are filled, and which of their rows are."""

    def __init__(
        self, method: LinearMethod, layer: Any, rows: Sequence[Rows], loader: Callable[..., None], columns: slice
    ) -> None:
        self._method = method
        self._parts = layer.parts
        self._rows = rows
        self._loader = loader
        self._columns = columns  # of the weight, those of this rank's share of the inputs
        self._count = sum(run.count for run in rows)
        self._needed = torch.ones(self._count, dtype=torch.bool, device="cpu")
        if isinstance(layer, VocabParallelEmbedding):
            self._needed[layer.shard_indices.num_org_elements :] = False
        self._suffixes = list(endings(method.checkpoint, method.names).values())
        self._filled = {suffix: torch.zeros_like(self._needed) for suffix in self._suffixes}

    def fill(self, suffix: str, loaded: Tensor, shard_id: Any) -> None:
        """Copy this rank's rows and columns of a tensor of the checkpoint."""
        source = self._source_rows(loaded.shape[0], shard_id)
        for start, part in self._starts():
            mine = source[start : start + height(part)]
            at = mine.nonzero().squeeze(1)
            if not len(at):
                continue
            name = self._name(start + int(at[0]))
            stored = name + suffix
            target = tensor_of(part, suffix)
            if target is None or bool(self._filled[suffix][start + at].any()):
                raise FormatError(
                    f"{stored}: met while vLLM loads {self._method.prefix}, which has no place for it (any more)"
                )
            columns = columns_of(self._columns, part, suffix)
            values = loaded[mine[at] - 1][:, columns]
            if values.shape[1:] != target.shape[1:]:
                raise FormatError(
                    f"{stored}: rows of {values.shape[1]} elements, vLLM's layer {self._method.prefix} takes {target.shape[1]}"
                )
            target[at.to(target.device)] = values.to(target.device, target.dtype)
            self._filled[suffix][start + at] = True

    def check(self) -> None:
        """Raise FormatError, naming the tensor, unless every row was filled."""
        for start, part in self._starts():
            for suffix in self._suffixes:
                target = tensor_of(part, suffix)
                if target is None:
                    continue
                rows = slice(start, start + target.shape[0])
                missing = (self._needed[rows] & ~self._filled[suffix][rows]).nonzero()
                if len(missing):
                    name = self._name(start + int(missing[0]))
                    raise FormatError(
                        f"{name}{suffix}: vLLM's layer {self._method.prefix} needs it, but was not given it"
                    )

    def _source_rows(self, height: int, shard_id: Any) -> Tensor:
        """For each row of this rank's matrix 1 + the row of the tensor at hand that goes there, or 0, by vLLM's own loader."""
        index = nn.Parameter(torch.zeros(self._count, dtype=torch.int64, device="cpu"), requires_grad=False)
        set_weight_attrs(index, {"output_dim": 0})
        numbers = torch.arange(1, height + 1, device="cpu")
        self._loader(index, numbers, *(() if shard_id is None else (shard_id,)))
        return index.data

    def _starts(self) -> Iterator[tuple[int, Weight]]:
        start = 0
        for part in self._parts:
            yield start, part
            start += height(part)

    def _name(self, row: int) -> str:
        return next(run.name for run in self._rows if run.start <= row < run.start + run.count)


def _whole_rows(layer: Any) -> list[int]:
    """Rows of each logical part of a layer's matrix before it is cut over cards."""
    if isinstance(layer, VocabParallelEmbedding):
        return [layer.org_vocab_size]
    if isinstance(
        layer, QKVParallelLinear
    ):  # its output_sizes count a head of k and v once for each rank that holds it
        kv = layer.total_num_kv_heads
        return [layer.total_num_heads * layer.head_size, kv * layer.head_size, kv * layer.v_head_size]
    return list(getattr(layer, "output_sizes", [layer.output_size]))


def _runs(checkpoint: Checkpoint, rows: Sequence[Rows]) -> Iterator[tuple[str, int]]:
    """(a tensor, number of rows) for each run of neighbouring rows that are stored alike."""
    runs: list[tuple[str, int]] = []
    for run in rows:
        if runs and checkpoint.format_of(runs[-1][0]) == checkpoint.format_of(run.name):
            runs[-1] = runs[-1][0], runs[-1][1] + run.count
        else:
            runs.append((run.name, run.count))
    yield from runs


def part_dtype(checkpoint: Checkpoint, names: Iterable[str], suffix: str) -> torch.dtype | None:
    """What tensors of this suffix are stored in; None for kept ones, which vLLM converts."""
    stored = (checkpoint.entry(name).parts.get(suffix) for name in names) if suffix else ()
    return next((TORCH_DTYPES[part[1].info.dtype] for part in stored if part), None)


def add_placeholder(layer: Any, name: str, dtype: torch.dtype, loader: Loader) -> None:
    """An empty parameter for vLLM to find; it takes nothing itself. Its dtype keeps vLLM from warning of conversions."""
    parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    layer.register_parameter(name, parameter)
    set_weight_attrs(parameter, {"weight_loader": loader})


def height(part: Weight) -> int:
    return part.shape[0] if isinstance(part, PackedWeight) else part.tensor.shape[0]


def endings(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """What the names of some parameters' tensors end in once vLLM reads them -> the same in the checkpoint.

    vLLM finds a layer's parameter by what follows the last dot, so a part's suffix joins the name it belongs to.
    """
    suffixes = {"": None} | {suffix: None for name in names for suffix in checkpoint.entry(name).parts}
    return {suffix.replace(".", "_"): suffix for suffix in suffixes}


def multiply(x: Tensor, parts: Iterable[Any], bias: Tensor | None) -> Tensor:
    """x [..., in] times the rows of all parts, one below the other: [..., n] in x's dtype."""
    held = [
        (part.spec, part.tensors, part.shape[0])
        if isinstance(part, PackedWeight)
        else (dispatch.KEPT, [part.tensor], part.tensor.shape[0])
        for part in parts
    ]
    return dispatch.fused_linear(x, held, bias, CHOSEN)


def empty_weight(
    checkpoint: Checkpoint,
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str,
    uses: Sequence[Use] = ("linear",),
) -> Weight:
    """Room for a weight of this shape that is stored as ``name`` is; a kept one has ``dtype``."""
    fmt = checkpoint.format_of(name)
    return KeptWeight(shape, dtype, device) if fmt is None else PackedWeight(fmt, shape, device, uses)


def check_share(checkpoint: Checkpoint, name: str, inputs: int, share: int) -> None:
    """Raise UnsupportedError if a card's share of the inputs of a packed tensor is no whole number of groups."""
    fmt = checkpoint.format_of(name)
    if fmt is None or share == inputs or share % fmt.step == 0:
        return
    work = ", ".join(map(str, sizes(checkpoint.tensors, checkpoint.format_of, checkpoint.config)))
    raise UnsupportedError(
        f"{name}: {inputs} inputs over {inputs // share} cards are {share} each, no whole number of groups of "
        f"{fmt.step}; --tensor-parallel-size can be {work}"
    )


def tensor_of(part: Weight, suffix: str) -> Tensor | None:
    """What a stored tensor of this suffix fills in the part, if anything."""
    if isinstance(part, KeptWeight):
        return part.tensor if not suffix else None
    return part.part(suffix) if suffix else None


def columns_of(inputs: slice, part: Weight, suffix: str) -> slice:
    """Columns of a stored tensor that hold these inputs of a weight."""
    return inputs if isinstance(part, KeptWeight) else part.fmt.columns(inputs.start, inputs.stop)[suffix]
