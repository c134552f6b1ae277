"""Tensor parallelism ahead of time: which numbers of cards split a model without cutting a group of packed weights in two.

Serving engines cut the output axis of q, k, v, gate and up and the input axis of what follows them (o_proj, down_proj, out_proj).
Output rows can be cut anywhere; the input axis of a packed weight only between groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.base import Format
from kappaquant.formats.codebook import GroupedFormat
from kappaquant.models.roles import Role, TensorKind, kinds_of

ROUTED = (Role.ROUTED_GATE, Role.ROUTED_UP, Role.ROUTED_GATE_UP, Role.ROUTED_DOWN)
MOST_CARDS = 64
"""Sizes looked at when those that work are listed."""

# Roles whose input axis is cut
_CUT_INPUTS = (Role.ATTENTION_O, Role.MLP_DOWN, Role.SHARED_DOWN, Role.ROUTED_DOWN, Role.GDN_OUT)
# keys of config.json whose value every card must get an equal, whole share of
_SHARED_OUT = (
    "num_attention_heads",
    "num_heads",  # of a vision tower
    "linear_num_key_heads",
    "linear_num_value_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)


def problems(
    tensors: Mapping[str, TensorInfo],
    format_of: Callable[[str], Format | None],
    config: Mapping[str, Any],
    cards: int,
    *,
    expert_parallel: bool = False,
) -> Iterator[str]:
    """Why this many cards cannot share the model: one sentence for each key of config.json or tensor; none if they can.

    Args:
        format_of: name -> format, None where a tensor is kept.
        expert_parallel: routed experts are dealt out whole instead of being cut.
    """
    for part, where in (
        (config.get("text_config") or config, ""),
        (config.get("vision_config") or {}, "vision_config."),
    ):
        yield from (f"{where}{problem}" for problem in _uneven(part, cards, expert_parallel))
    for name, kind in kinds_of(tensors, config).items():
        fmt = format_of(name)
        if fmt is None or not _cut(name, kind, expert_parallel):
            continue
        inputs = kind.inputs(tensors[name].shape)
        share, rest = divmod(inputs, cards)
        if rest or (share % fmt.step and cards > 1):
            yield (
                f"{name}: {inputs} inputs over {cards} cards are {inputs / cards:g} each, no whole number of "
                f"groups of {fmt.step}"
            )


def sizes(
    tensors: Mapping[str, TensorInfo],
    format_of: Callable[[str], Format | None],
    config: Mapping[str, Any],
    *,
    expert_parallel: bool = False,
) -> list[int]:
    """The numbers of cards up to ``MOST_CARDS`` that can share the model."""
    return [
        cards
        for cards in range(1, MOST_CARDS + 1)
        if not any(problems(tensors, format_of, config, cards, expert_parallel=expert_parallel))
    ]


def bytes_per_card(
    tensors: Mapping[str, TensorInfo],
    format_of: Callable[[str], Format | None],
    config: Mapping[str, Any],
    cards: int,
    *,
    expert_parallel: bool = False,
    tile: tuple[int, int] = (1, 1),
) -> int:
    """Bytes of weights that the fullest card holds: matrices cut or dealt out, what is small on every card, no MTP head.

    With ``expert_parallel`` a card holds the experts' share rounded up to whole experts.

    Args:
        tile: rows and inputs that a kernel's layout of codebooks and trellis codes takes at once; a card's share of such a matrix is
            padded to whole ones, in as many bytes a weight.
    """
    total = Fraction(0)
    for name, kind in kinds_of(tensors, config).items():
        info, fmt = tensors[name], format_of(name)
        if kind.role is Role.MTP:
            continue
        share = _share(info, kind, config, cards, expert_parallel)
        size = (fmt.nbytes(info.shape) if fmt else info.nbytes) * share
        if fmt and isinstance(fmt.rowwise, GroupedFormat):
            size *= _padding(info, kind, fmt, share, tile, _cut(name, kind, expert_parallel))
        total += size
    return math.ceil(total)


def _padding(
    info: TensorInfo, kind: TensorKind, fmt: Format, share: Fraction, tile: tuple[int, int], by_input: bool
) -> Fraction:
    """How many times its packed bytes, in which groups are whole, a share takes with its rows and inputs padded to whole tiles."""
    inputs = Fraction(kind.inputs(info.shape))
    rows = info.shape[-2] * info.shape[-1] / inputs
    if by_input:
        inputs *= share
    elif len(info.shape) == 2:
        rows *= share
    whole = Fraction(math.ceil(inputs / fmt.step) * fmt.step)
    steps = tile[0], math.lcm(tile[1], fmt.step)
    padded = (math.ceil(size / step) * step / size for size, step in zip((rows, whole), steps, strict=True))
    return math.prod(padded, start=Fraction(1))


def _share(
    info: TensorInfo, kind: TensorKind, config: Mapping[str, Any], cards: int, expert_parallel: bool
) -> Fraction:
    """The part of a tensor that one card holds."""
    text = config.get("text_config") or config
    if kind.part in (Role.ROUTER, Role.SHARED_EXPERT_GATE) or len(info.shape) < 2:
        return Fraction(1)
    if kind.part in (Role.ATTENTION_K, Role.ATTENTION_V):
        return Fraction(1, min(cards, text.get("num_key_value_heads") or cards))
    if expert_parallel and kind.part in ROUTED:
        experts = next((text[key] for key in ("num_experts", "num_local_experts") if key in text), cards)
        return Fraction(-(-experts // cards), experts)
    return Fraction(1, cards)


def _uneven(part: Mapping[str, Any], cards: int, expert_parallel: bool) -> Iterator[str]:
    for key in _SHARED_OUT:
        value = part.get(key)
        if isinstance(value, int) and value % cards and not (expert_parallel and key == "moe_intermediate_size"):
            yield f"{key} {value} is not divisible by {cards}"
    heads = part.get("num_key_value_heads")
    if isinstance(heads, int) and heads % cards and cards % heads:
        yield f"num_key_value_heads {heads} neither divides {cards} nor is divisible by it"


def _cut(name: str, kind: TensorKind, expert_parallel: bool) -> bool:
    if kind.role is Role.VISION:
        return name.endswith((".attn.proj.weight", "linear_fc2.weight", ".fc2.weight", ".out_proj.weight"))
    return kind.part in _CUT_INPUTS and not (expert_parallel and kind.part is Role.ROUTED_DOWN)
