"""The proof that folding changes nothing: what transformers' own model computes before and after, on a few tokens in float32.

A small model is compared whole. Of a larger one each layer is, between a random embedding and head, and then embedding and head
are; of their experts, neurons and tokens only the first are taken, so that memory is bounded by the attention of one layer.
"""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kappaquant.errors import UnsupportedError
from kappaquant.exports.mlx.layout import Layout, Tensor
from kappaquant.exports.mlx.rotation import rotate
from kappaquant.exports.mlx.slabs import Slab, folded
from kappaquant.formats.entry import Entry
from kappaquant.models.skeleton import model_class

TOLERANCE = 1e-4  # of the largest value; float32's own noise is a hundredth of that
WHOLE = 1 << 27  # parameters up to which a model is compared whole: 0.5 GB
TOKENS, EXPERTS, NEURONS = 64, 8, 2048  # what is taken of a larger one
_LENGTH = 12  # tokens in a row
_ENDS = "embedding and head"


@dataclass(frozen=True)
class Part:
    """What is compared at once: a name for messages, and its tensors."""

    name: str
    layer: int | None
    tensors: tuple[Tensor, ...]


class Check:
    """The comparisons that an export needs, and what they found so far."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        params = sum(t.rows * t.width * len(t.pieces) for t in layout.tensors)
        self.whole = params <= WHOLE
        self.parts = self._parts() if layout.rotated else []
        self.found: dict[str, float] = {}

    def _parts(self) -> list[Part]:
        if self.whole:
            return [Part("the model", None, tuple(self.layout.tensors))]
        layers: dict[int | None, list[Tensor]] = defaultdict(list)
        for tensor in self.layout.tensors:
            layers[_layer(tensor)].append(tensor)
        return [Part(_ENDS if i is None else f"layer {i}", i, tuple(members)) for i, members in layers.items()]

    def resume(self, found: Mapping[str, float]) -> None:
        """Take over what an earlier run found."""
        self.found |= found

    def run(self, part: Part, entries: Mapping[str, Entry]) -> float:
        """The largest difference that folding makes to one part, relative to the largest value.

        Raises:
            UnsupportedError: it is more than rounding explains.
        """
        before, after = self._ends(part, entries) if part.name == _ENDS else self._logits(part, entries)
        difference = float((before - after).abs().max() / before.abs().max())
        if not difference <= TOLERANCE:
            raise UnsupportedError(
                f"{part.name}: folding norms and rotation into the weights changes what it computes by {difference:.2g} of the "
                f"largest value, {TOLERANCE:g} is allowed; export with --no-rotate, and report this model"
            )
        self.found[part.name] = difference
        return difference

    def result(self) -> dict[str, Any] | None:
        """For the report: a power of ten that bounds every difference; None where nothing was folded."""
        if not self.parts:
            return None
        how = f"layer by layer, of which up to {EXPERTS} experts, {NEURONS} neurons and {TOKENS} tokens were taken"
        bound = 10.0 ** math.ceil(math.log10(max(*self.found.values(), 1e-9)))
        return {"compared": "the whole model" if self.whole else how, "relative_difference_below": bound}

    def _logits(self, part: Part, entries: Mapping[str, Entry]) -> tuple[torch.Tensor, torch.Tensor]:
        config = self._config(part)
        model = model_class(config)._from_config(config, dtype=torch.float32).eval()
        parameters = {name: p.data for name, p in model.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, config.vocab_size, (2, _LENGTH), generator=generator)
        ends = {name: parameters[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
        for weight in ends.values():
            weight.normal_(generator=generator)
        logits = []
        for fold in (False, True):
            if fold and not self.whole:
                for weight in ends.values():
                    weight.copy_(rotate(weight))
            for tensor in part.tensors:
                self._fill(tensor, parameters, entries, fold)
            with torch.inference_mode():
                logits.append(model(input_ids=ids, use_cache=False).logits)
        return logits[0], logits[1]

    def _config(self, part: Part) -> Any:
        """The model's configuration, or one of a single layer between few tokens."""
        config = copy.deepcopy(self.layout.text)
        config.architectures, config.tie_word_embeddings = None, False
        if self.whole:
            return config
        assert part.layer is not None
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, TOKENS, None
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[part.layer]]
        if hasattr(config, "mlp_only_layers"):
            sparse = any(".switch_mlp." in tensor.key for tensor in part.tensors)
            config.mlp_only_layers, config.decoder_sparse_step = [] if sparse else [0], 1
        limits = dict.fromkeys(
            ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), NEURONS
        )
        limits |= dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), EXPERTS)
        for name, limit in limits.items():
            if getattr(config, name, None):
                setattr(config, name, min(getattr(config, name), limit))
        return config

    def _fill(
        self, tensor: Tensor, parameters: Mapping[str, torch.Tensor], entries: Mapping[str, Entry], fold: bool
    ) -> None:
        """Put a tensor, folded or as the source has it, where transformers' model wants it; the first rows and columns."""
        name = self.layout.places[tensor.pieces[0].name].target
        name = "lm_head.weight" if tensor.path == self.layout.model.head else name
        name = re.sub(r"\.layers\.\d+\.", ".layers.0.", name) if not self.whole else name
        parameter = parameters[name if name == "lm_head.weight" else "model." + name.removeprefix(self.layout.root)]
        target = parameter.view(1, -1, parameter.shape[-1])
        if ".switch_mlp." in tensor.key:
            half = parameter.shape[1] // 2
            target = {
                "gate_proj": parameter[:, :half], "up_proj": parameter[:, half:], "down_proj": parameter,
            }[tensor.path.rpartition(".")[2]]  # fmt: skip
        source = tensor if fold else replace(tensor, action="copy", gain=None)
        slab = Slab(0, target.shape[0], (0, target.shape[1]), (0, target.shape[2]))
        values = folded(source, slab, dict(entries), self.layout.model.gain != "weight")
        if fold and tensor.action in ("one", "plus_one") and self.layout.model.gain != "weight":
            values -= 1.0  # MLX's norm multiplies by its weight, transformers' by 1 + weight
        target.copy_(values)

    def _ends(self, part: Part, entries: Mapping[str, Entry]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of an embedded token with no layer between."""
        by_key = {tensor.path.removeprefix(self.layout.model.prefix): tensor for tensor in part.tensors}
        one_plus = self.layout.model.gain != "weight"

        def take(key: str, fold: bool) -> torch.Tensor:
            tensor = by_key[key]
            source = tensor if fold else replace(tensor, action="copy", gain=None)
            rows = min(tensor.rows, TOKENS)
            return folded(source, Slab(0, 1, (0, rows), (0, tensor.width)), dict(entries), one_plus)[0]

        head = self.layout.model.head
        by_key["head"] = next(tensor for tensor in part.tensors if tensor.path == head)
        results = []
        for fold in (False, True):
            x, norm, matrix = take("embed_tokens", fold), take("norm", fold), take("head", fold)
            gain = norm + 1.0 if one_plus and not fold else norm
            unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.layout.text.rms_norm_eps)
            results.append((unit * gain) @ matrix.T)
        return results[0], results[1]


def _layer(tensor: Tensor) -> int | None:
    match = re.search(r"(?:^|\.)layers\.(\d+)\.", tensor.key)
    return int(match[1]) if match else None
