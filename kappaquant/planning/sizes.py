"""The dry run's arithmetic: exact bytes, bits per weight and bytes read per decoded token, from headers and a plan alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

from kappaquant.files.safetensors import TensorInfo, build_header, file_size
from kappaquant.formats.base import Format
from kappaquant.formats.entry import stored_parts
from kappaquant.models.roles import Role, TensorKind, kinds_of, tied_embeddings
from kappaquant.planning.plan import Plan

_ROUTED = (Role.ROUTED_GATE, Role.ROUTED_UP, Role.ROUTED_GATE_UP, Role.ROUTED_DOWN)
_TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k")


@dataclass(frozen=True)
class TensorSize:
    """One tensor under a plan.

    Attributes:
        format: its format's id, or "kept".
        bits: of one code, 16 for kept.
        params: number of weights.
        source_bytes: its bytes in the source.
        output_bytes: its bytes in the output: packed indices and norms, or the source's own bytes.
        active: the share of it that one decoded token reads, 0 to 1; exact.
    """

    name: str
    role: Role
    family: str
    format: str
    bits: int
    params: int
    source_bytes: int
    output_bytes: int
    active: Fraction


@dataclass(frozen=True)
class Total:
    """Sums over some tensors; ``bits_per_weight`` counts norms and padding."""

    tensors: int
    params: int
    source_bytes: int
    output_bytes: int
    active_params: int
    active_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.output_bytes / self.params if self.params else 0.0


@dataclass(frozen=True)
class Summary:
    """The dry run: per tensor, per family (in order of size), per format (by bits, ascending; kept last), and in all.

    Bytes are the tensors' data; a file adds its safetensors header and the source's other files. Active bytes are what
    decoding one token of text reads: routed experts by top-k, one row of the embedding, no vision tower and no MTP head.

    Attributes:
        mtp: sums over the multi-token-prediction head, which only speculative decoding reads; of no tensors where there
            is none.
    """

    per_tensor: tuple[TensorSize, ...]
    families: dict[str, Total]
    by_format: dict[str, Total]
    total: Total
    mtp: Total

    @property
    def output_bytes(self) -> int:
        return self.total.output_bytes

    @property
    def bits_per_weight(self) -> float:
        return self.total.bits_per_weight

    @property
    def active_bytes_per_token(self) -> int:
        return self.total.active_bytes


def summary(plan: Plan, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Summary:
    """Exact sizes of what ``plan`` makes of these tensors. Raises PlanError where the plan does not fit them."""
    plan.check(tensors, config)
    kinds = kinds_of(tensors, config)
    active = active_shares(tensors, config)
    rows = []
    for name, info in tensors.items():
        fmt = plan.format_of(name)
        rows.append(
            TensorSize(
                name=name,
                role=kinds[name].role,
                family=kinds[name].family,
                format=plan.choice(name).format,
                bits=plan.bits(name),
                params=info.numel,
                source_bytes=info.nbytes,
                output_bytes=fmt.nbytes(info.shape) if fmt else info.nbytes,
                active=active[name],
            )
        )
    families: dict[str, list[TensorSize]] = {}
    by_format: dict[str, list[TensorSize]] = {}
    for row in sorted(rows, key=lambda row: (row.bits, row.format)):
        families.setdefault(row.family, []).append(row)
        by_format.setdefault(row.format, []).append(row)
    totals = {family: _total(members) for family, members in families.items()}
    return Summary(
        per_tensor=tuple(rows),
        families=dict(sorted(totals.items(), key=lambda item: -item[1].output_bytes)),
        by_format={fmt: _total(members) for fmt, members in by_format.items()},
        total=_total(rows),
        mtp=_total(row for row in rows if row.role is Role.MTP),
    )


def shown(nbytes: int) -> str:
    """Bytes in units of 1000 and of 1024: "18.00 GB, 16.76 GiB"."""
    texts = []
    for base, names in ((1000, ("bytes", "KB", "MB", "GB", "TB")), (1024, ("bytes", "KiB", "MiB", "GiB", "TiB"))):
        power = next(p for p in range(len(names) - 1, -1, -1) if abs(nbytes) >= base**p or not p)
        texts.append(f"{nbytes / base**power:.2f} {names[power]}" if power else f"{nbytes} bytes")
    return ", ".join(dict.fromkeys(texts))


def file_bytes(shards: Mapping[str, Mapping[str, TensorInfo]], format_of: Callable[[str], Format | None]) -> int:
    """Exact bytes of the kappaquant checkpoint's safetensors files, headers included, from the source's headers and a plan alone."""
    total = 0
    for tensors in shards.values():
        parts = [part for name, info in tensors.items() for part in stored_parts(info, format_of(name)).values()]
        header, stored = build_header(parts)
        total += file_size(stored, header)
    return total


def most_bytes(info: TensorInfo, fmt: Format | None, digits: int) -> int:
    """Bytes that a tensor takes in a file at most: data, and entries of a header whose offsets have no more than so many digits."""
    parts, nbytes = _unnamed(info.dtype, info.shape, fmt)
    return nbytes + parts * (len(json.dumps(info.name)) + 2 * digits)


def most_header_bytes(shards: Collection[str]) -> int:
    """Bytes of these files' headers besides the entries, at most: eight more of each are its alignment."""
    return len(shards) * (len(build_header(())[0]) + 8)


def header_bytes_at_most(
    shards: Mapping[str, Mapping[str, TensorInfo]], formats: Callable[[str], Iterable[Format | None]]
) -> int:
    """Bytes of the headers of the checkpoint's files, whichever of its formats each tensor takes."""
    digits = len(str(sum(info.nbytes for tensors in shards.values() for info in tensors.values())))
    total = most_header_bytes(shards)
    for tensors in shards.values():
        for name, info in tensors.items():
            total += max(
                most_bytes(info, fmt, digits) - (fmt.nbytes(info.shape) if fmt else info.nbytes)
                for fmt in formats(name)
            )
    return total


@cache
def _unnamed(dtype: str, shape: tuple[int, ...], fmt: Format | None) -> tuple[int, int]:
    """Parts of a tensor, and their bytes with those of their header's entries besides the tensor's name and the digits of offsets."""
    parts = stored_parts(TensorInfo("", dtype, shape), fmt).items()
    total = 0
    for suffix, part in parts:
        entry = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [0, 0]}
        text = json.dumps(entry, separators=(",", ":"))
        total += part.nbytes + len(suffix) + len(text) - len("00") + len(",:")
    return len(parts), total


def active_shares(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Fraction]:
    """The share of each tensor that decoding one token of text reads, 0 to 1; exact."""
    kinds = kinds_of(tensors, config)
    experts = _experts_per_layer(tensors, kinds)
    return {
        name: _active(info, kinds[name], experts.get(kinds[name].layer, 0), config) for name, info in tensors.items()
    }


def _total(rows: Iterable[TensorSize]) -> Total:
    rows = list(rows)
    return Total(
        tensors=len(rows),
        params=sum(row.params for row in rows),
        source_bytes=sum(row.source_bytes for row in rows),
        output_bytes=sum(row.output_bytes for row in rows),
        active_params=round(sum(row.params * row.active for row in rows)),
        active_bytes=round(sum(row.output_bytes * row.active for row in rows)),
    )


def _experts_per_layer(tensors: Mapping[str, TensorInfo], kinds: Mapping[str, TensorKind]) -> dict[int | None, int]:
    """Routed experts of each layer, counted from the tensors themselves."""
    counts: dict[int | None, int] = {}
    for name, kind in kinds.items():
        if kind.role in _ROUTED:
            count = tensors[name].shape[0] if kind.expert is None else kind.expert + 1
            counts[kind.layer] = max(counts.get(kind.layer, 0), count)
    return counts


def _active(info: TensorInfo, kind: TensorKind, experts: int, config: Mapping[str, Any]) -> Fraction:
    if kind.role in (Role.VISION, Role.TOWER, Role.MTP):
        return Fraction(0)
    if kind.role is Role.EMBEDDING and not tied_embeddings(config) and info.numel:
        return Fraction(1, info.shape[0])
    if kind.role in _ROUTED and experts:
        return min(Fraction(1), Fraction(_top_k(config, experts), experts))
    return Fraction(1)


def _top_k(config: Mapping[str, Any], experts: int) -> int:
    """Experts a token is sent to; all of them where config.json does not say."""
    for part in (config.get("text_config") or {}, config):
        for key in _TOP_K_KEYS:
            if isinstance(part.get(key), int):
                return part[key]
    return experts
