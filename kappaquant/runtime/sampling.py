"""From logits to the next token of each row, on the device and without waiting for it.

Sampling stays outside the captured graph, so that options may differ from prompt to prompt; docs/generation.md says what
draws take.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.kernels.cpu.threads import core_only


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest token each time; else logits are divided by it.
        top_p: only the likeliest tokens that together have this probability.
        top_k: only so many of the likeliest tokens; 0 for all.
        min_p: only tokens of at least this share of the likeliest token's probability.
        seed: makes draws repeatable on one kind of device.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.temperature != float("inf")):
            raise UnsupportedError(f"temperature = {self.temperature}: must be 0 or more, and finite")
        if not 0 < self.top_p <= 1:
            raise UnsupportedError(f"top_p = {self.top_p}: must be above 0 and at most 1")
        if self.top_k < 0:
            raise UnsupportedError(f"top_k = {self.top_k}: must be 0, for all tokens, or more")
        if not 0 <= self.min_p <= 1:
            raise UnsupportedError(f"min_p = {self.min_p}: must be from 0 to 1")


class Sampler:
    """Draws tokens; holds the generator, so that one sampler goes with one answer."""

    def __init__(self, options: Sampling, device: torch.device) -> None:
        self.options = options
        self.generator = torch.Generator(device)
        if options.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(options.seed)

    @torch.no_grad()
    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [B, V] -> tokens, int64 [B]."""
        with core_only() if logits.device.type == "cpu" else nullcontext():
            return self._drawn(logits)

    def _drawn(self, logits: Tensor) -> Tensor:
        chosen = self.options
        if chosen.temperature == 0:
            return logits.argmax(-1)
        scores = logits.float() / chosen.temperature
        tokens = None
        if chosen.top_k and chosen.top_k < scores.shape[1]:
            scores, tokens = scores.topk(chosen.top_k, dim=-1)  # in descending order
        elif chosen.top_p < 1:
            scores, tokens = scores.sort(dim=-1, descending=True)
        probabilities = scores.softmax(-1)
        if chosen.top_p < 1:
            before = probabilities.cumsum(-1) - probabilities  # the token that crosses the bound still counts
            probabilities = probabilities.masked_fill(before >= chosen.top_p, 0)
        if chosen.min_p > 0:
            bar = chosen.min_p * probabilities.amax(-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < bar, 0)
        # the largest of p / Exp(1) falls on each token with probability p; torch.multinomial draws so, but may wait
        noise = torch.empty_like(probabilities).exponential_(generator=self.generator)
        drawn = (probabilities / noise).argmax(-1, keepdim=True)
        return (drawn if tokens is None else tokens.gather(-1, drawn)).squeeze(-1)
