"""Give a model heavy-tailed weights without changing what it computes.

Wherever one tensor writes a channel and others read it, with nothing but products in between, the channel can be
multiplied by 2^-k in the writer and by 2^k in the readers. The exponents k follow a geometric tail whose steepness is
fitted so that the excess kurtosis of the tensor that matters comes as near as it can to a published profile.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Weights = dict[str, Tensor]

#: Excess kurtosis per family in Qwen3.6-35B-A3B; where the published profile gives a range, a value inside it.
TARGETS = {
    "routed gate_up": 3.4,
    "routed down": 3.4,
    "attention q": 6.5,
    "attention k": 6.5,
    "attention v": 6.5,
    "attention o": 6.5,
    "shared gate": 9.0,
    "shared up": 5.6,
    "shared down": 16.3,
    "router": 17.5,
    "in_proj_b": 20.0,
    "out_proj": 30.0,
}
#: The profile has no line for these; below 4 is the bucket its in_proj_qkv and in_proj_z fall in.
IN_PROJ_TARGET = 3.0
#: Random choices of large columns tried for each norm.
ORDERS = 60

_FAMILIES = {
    r"mlp\.experts\.gate_up_proj$": "routed gate_up",
    r"mlp\.experts\.down_proj$": "routed down",
    r"self_attn\.([qkvo])_proj\.weight$": r"attention \1",
    r"mlp\.shared_expert\.(gate|up|down)_proj\.weight$": r"shared \1",
    r"mlp\.gate\.weight$": "router",
    r"mlp\.shared_expert_gate\.weight$": "shared_expert_gate",
    r"linear_attn\.(in_proj_qkv|in_proj_z|in_proj_a|in_proj_b|out_proj|conv1d)\.weight$": r"\1",
    r"(embed_tokens|lm_head)\.weight$": r"\1",
}


def family_of(name: str) -> str | None:
    """The profile's family of a parameter, or None for norms and other vectors."""
    for pattern, family in _FAMILIES.items():
        match = re.search(pattern, name)
        if match:
            return match.expand(family)
    return None


def kappa(weight: Tensor) -> float:
    """Excess kurtosis of all elements, E[x^4] / E[x^2]^2 - 3 in fp64: 0 for Gaussian weights."""
    square = weight.double().square()
    return float(square.square().mean() / square.mean().square() - 3)


def kappa_table(weights: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Per family: number of tensors, mean and largest excess kurtosis, and the published value aimed at (if any)."""
    found: dict[str, list[float]] = {}
    for name, weight in weights.items():
        family = family_of(name)
        if family:
            found.setdefault(family, []).append(kappa(weight))
    table: dict[str, dict[str, float]] = {}
    for family, values in sorted(found.items()):
        table[family] = {
            "tensors": len(values),
            "mean": round(sum(values) / len(values), 2),
            "max": round(max(values), 2),
        }
        if family in TARGETS:
            table[family]["target"] = TARGETS[family]
    return table


def _tail(n: int, generator: torch.Generator) -> Tensor:
    """Quantiles of the exponential distribution, fp64 [n], in random order."""
    quantiles = -torch.log((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    return quantiles[torch.randperm(n, generator=generator)]


class _Channels:
    """A weight seen as n channels of which each may get a factor: enough to know its kurtosis for any factors."""

    def __init__(self, channels_last: Tensor):
        square = channels_last.double().square().flatten(0, -2)  # [elements per channel, n]
        self.size, self.second, self.fourth = square.numel(), square.sum(0), square.square().sum(0)

    def misses(self, factors: Tensor, target: float) -> Tensor:
        """|kurtosis - target| for each row of factors [..., n]."""
        second, fourth = factors.square() @ self.second, factors.pow(4) @ self.fourth
        return (self.size * fourth / second.square() - 3 - target).abs()


def _exponents(tail: Tensor, slopes: int, offsets: int) -> Tensor:
    """Candidate exponents k >= 0, fp64 [slopes * offsets, n]: floor(slope * tail + offset)."""
    slope = torch.linspace(0, 1, slopes, dtype=torch.float64)[:, None, None]
    offset = torch.arange(offsets, dtype=torch.float64)[:, None] / offsets
    return (slope * tail + offset).floor().flatten(0, 1)


def _fit(weight: Tensor, target: float, gen: torch.Generator) -> Tensor:
    """Factors 2^k >= 1, fp64 [n], for the last axis of weight that bring its kurtosis nearest to target."""
    tried = torch.exp2(_exponents(_tail(weight.shape[-1], gen), 101, 10))
    return tried[_Channels(weight).misses(tried, target).argmin()]


def _fit_softened(weight: Tensor, target: float, gen: torch.Generator) -> Tensor:
    """As _fit, after halving (in logs) the spread of column sizes: for weights with a longer tail than asked for."""
    size = weight.square().mean(0).sqrt().clamp(min=1e-12)
    level = torch.exp2((0.5 * (size.median() / size).log2()).round())
    return level * _fit(weight * level, target, gen)


def _fit_pair(rows: Tensor, rows_target: float, columns: Tensor, target: float, gen: torch.Generator) -> Tensor:
    """Factors fp64 [n] that multiply the last axis of columns and divide the first of rows, both near their targets.

    Some channels are made large in the columns and others in the rows: a channel that is small adds little to a
    tail, so the two tensors are shaped almost independently.
    """
    tail = _tail(columns.shape[-1], gen)
    opposite = tail.sort().values.flip(0)[tail.argsort().argsort()]  # largest where tail is smallest
    tried = torch.exp2(_exponents(tail, 41, 5)[:, None] - _exponents(opposite, 41, 5)).flatten(0, 1)
    miss = _Channels(columns).misses(tried, target) / (target + 3)
    miss += _Channels(rows.transpose(0, -1)).misses(1 / tried, rows_target) / (rows_target + 3)
    return tried[miss.argmin()]


def _norm_against_readers(
    weights: Weights, norm: str, readers: list[str], wanted: dict[str, float], gen: torch.Generator
) -> None:
    """Move powers of two from the gain (1 + w) of an RMSNorm into the columns of everything that reads it.

    wanted names readers and their targets. Each of many random choices of the large columns is fitted to the first
    reader; the one that serves the others best is taken. The smallest gain keeps its size and the others grow: 1 + w
    near zero would be lost in bf16.
    """
    fitted, *others = wanted

    def miss(factors: Tensor) -> float:
        """How far the other readers are from their targets."""
        return sum(abs(kappa(weights[name] * factors) - wanted[name]) / (wanted[name] + 3) for name in others)

    factors = min((_fit(weights[fitted], wanted[fitted], gen) for _ in range(ORDERS)), key=miss)
    factors = factors / factors.max()
    weights[norm] = (1 + weights[norm]) / factors - 1
    for name in readers:
        weights[name] = weights[name] * factors


def _rescale_attention(weights: Weights, at: str, heads_per_kv: int, head_dim: int, gen: torch.Generator) -> None:
    """Columns of q, k and v against the input norm; v's rows against o's columns (the output gate only multiplies)."""
    readers = [f"{at}self_attn.{x}_proj.weight" for x in "qkv"]
    wanted = {name: TARGETS[f"attention {x}"] for name, x in zip(readers, "qkv", strict=True)}
    _norm_against_readers(weights, f"{at}input_layernorm.weight", readers, wanted, gen)
    v, o = readers[2], f"{at}self_attn.o_proj.weight"
    # o's columns are [kv head, query head of its group, dim]; all query heads of a group read the same v rows.
    grouped = weights[o].unflatten(1, (-1, heads_per_kv, head_dim))
    columns = grouped.transpose(1, 2).flatten(0, 1).flatten(1)
    factors = _fit_pair(weights[v], TARGETS["attention v"], columns, TARGETS["attention o"], gen)
    weights[v] = weights[v] / factors[:, None]
    weights[o] = (grouped * factors.view(-1, 1, head_dim)).flatten(1)


def _rescale_delta_net(weights: Weights, at: str, head_dim: int, gen: torch.Generator) -> None:
    """Columns of all in_proj against the input norm; the gated norm's weight, shared by all heads, against out_proj."""
    readers = [f"{at}linear_attn.in_proj_{x}.weight" for x in ("qkv", "z", "a", "b")]
    wanted = {readers[0]: IN_PROJ_TARGET, readers[1]: IN_PROJ_TARGET, readers[3]: TARGETS["in_proj_b"]}
    _norm_against_readers(weights, f"{at}input_layernorm.weight", readers, wanted, gen)
    norm, out = f"{at}linear_attn.norm.weight", f"{at}linear_attn.out_proj.weight"
    heads = weights[out].unflatten(1, (-1, head_dim))
    factors = _fit(heads, TARGETS["out_proj"], gen)
    weights[norm] = weights[norm] / factors
    weights[out] = (heads * factors).flatten(1)


def _rescale_mlp(weights: Weights, at: str, gen: torch.Generator) -> None:
    """Columns of router, experts and shared expert against their norm; up's rows against down's columns."""
    gate_up, down = f"{at}mlp.experts.gate_up_proj", f"{at}mlp.experts.down_proj"
    shared = f"{at}mlp.shared_expert."
    readers = [gate_up, f"{at}mlp.gate.weight", f"{at}mlp.shared_expert_gate.weight"]
    readers += [f"{shared}{x}_proj.weight" for x in ("gate", "up")]
    gate, up = weights[gate_up].chunk(2, dim=1)
    factors = torch.stack([_fit_softened(expert, TARGETS["routed down"], gen) for expert in weights[down]])
    weights[gate_up] = torch.cat([gate, up / factors[:, :, None]], dim=1)
    weights[down] = weights[down] * factors[:, None, :]
    norm = f"{at}post_attention_layernorm.weight"
    wanted = {
        gate_up: TARGETS["routed gate_up"],
        f"{at}mlp.gate.weight": TARGETS["router"],
        f"{shared}gate_proj.weight": TARGETS["shared gate"],
    }
    _norm_against_readers(weights, norm, readers, wanted, gen)
    rows, columns = weights[f"{shared}up_proj.weight"], weights[f"{shared}down_proj.weight"]
    factors = _fit_pair(rows, TARGETS["shared up"], columns, TARGETS["shared down"], gen)
    weights[f"{shared}up_proj.weight"] = rows / factors[:, None]
    weights[f"{shared}down_proj.weight"] = columns * factors


def rescale(weights: Mapping[str, Tensor], config: Any, seed: int = 0) -> Weights:
    """Heavy-tailed weights, fp64, that compute what the given ones (fused 3-D experts) compute."""
    gen = torch.Generator().manual_seed(seed)
    out = {name: weight.detach().double().cpu() for name, weight in weights.items()}
    for layer, kind in enumerate(config.layer_types):
        at = f"model.layers.{layer}."
        if kind == "full_attention":
            group = config.num_attention_heads // config.num_key_value_heads
            _rescale_attention(out, at, group, config.head_dim, gen)
        else:
            _rescale_delta_net(out, at, config.linear_value_head_dim, gen)
        _rescale_mlp(out, at, gen)
    return out


class _Double(TorchFunctionMode):
    """Reads every request for fp32 as one for fp64, so that a model's own casts cannot hide a difference."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        wider = [torch.float64 if x is torch.float32 else x for x in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*wider, **named)


@contextmanager
def _default_double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def logits_fp64(model_class: Any, config: Any, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Logits [batch, length, vocabulary] of the model with these weights, computed in fp64 throughout."""
    with _default_double():
        model = model_class(config).eval()
    model.load_state_dict({name: weight.double() for name, weight in weights.items()})
    model.set_experts_implementation("eager")  # the fused expert products have no fp64 form
    with _Double():
        logits = model(input_ids=ids, use_cache=False).logits
    if logits.dtype != torch.float64:
        raise TypeError(f"the check ran in {logits.dtype}, not in float64")
    return logits


def check_same_function(
    model_class: Any, config: Any, before: Mapping[str, Tensor], after: Mapping[str, Tensor], ids: Tensor
) -> float:
    """Largest difference of logits relative to the largest logit; ValueError above 1e-9."""
    expected = logits_fp64(model_class, config, before, ids)
    worst = float((logits_fp64(model_class, config, after, ids) - expected).abs().max() / expected.abs().max())
    if not worst <= 1e-9:
        raise ValueError(f"rescaling changed the logits by {worst:.3e} of the largest; at most 1e-9 is rounding")
    return worst
