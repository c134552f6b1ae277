"""The tables of ``benchmarks.cpu_decode`` in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
Lines = tuple[Sequence[str], list[list[str]]]


def models(rows: Sequence[Row]) -> Lines:
    """(head, cells) of layers and of the small model: milliseconds, tokens per second, weights read, and llama.cpp's time."""
    peers = list(dict.fromkeys(peer for row in rows if "model" in row for peer in row.get("times_faster_than", ())))
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if "model" in row and "absent" not in row:
            found.setdefault((row["part"], row["model"]), {})[row["what"]] = row
    cells = []
    for (part, name), of in found.items():
        decode, prompt = of["decode"], of["prompt"]
        faster = [
            " / ".join(
                f"{row['times_faster_than'][peer]:.2f}" if peer in row["times_faster_than"] else "–"
                for row in of.values()
            )
            for peer in peers
        ]
        cells.append(
            [
                "a layer of the 35 B model" if part == "layers" else "SmolLM2-135M", name, f"{decode['ms']:.2f}",
                f"{decode['gb_per_s']:.1f} ({decode['of_bandwidth']:.0%})", f"{prompt['ms']:.1f}", *faster,
            ]
        )  # fmt: skip
    return [
        "",
        "weights",
        "ms a token",
        "GB/s of weights",
        "ms a prompt of 512",
        *(f"x {peer}" for peer in peers),
    ], cells


def products(rows: Sequence[Row]) -> Lines:
    """(head, cells) of products: milliseconds by tokens, and the share of bandwidth for one token."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["part"] == "products":
            found.setdefault(row["what"], {})[row["tokens"]] = row
    tokens = sorted({count for at in found.values() for count in at})
    shape = next((f"{r['rows']} x {r['inputs']}" for at in found.values() for r in at.values()), "")
    cells = [
        [name, *(f"{at[count]['ms']:.2f}" for count in tokens), f"{at[tokens[0]]['of_bandwidth']:.0%}"]
        for name, at in found.items()
    ]
    return [f"ms, {shape}, tokens:", *map(str, tokens), f"of bandwidth, {tokens[0] if tokens else 1}"], cells


def machine(measured: dict[str, Any]) -> str:
    """What it was measured on, in one sentence."""
    about, llama = measured["environment"], measured["llama.cpp"]
    ours, theirs = measured["native_core"], llama.get("absent") or _sets(llama["compiled_for"])
    return (
        f"{about['cpu']}, {about['threads']} thread{'s'[: about['threads'] > 1]}, medians of {measured['rounds']} round"
        f"{'s'[: measured['rounds'] > 1]}, begun at a load of {about['load_before']}; reads "
        f"{measured['read_gb_per_s']} GB/s. Native core: {ours}; llama.cpp: {theirs}."
    )


def _sets(said: str) -> str:
    """The largest of the instruction sets that llama.cpp names."""
    known = [part.partition(" = ")[0].rpartition(": ")[2].strip() for part in said.split("|")]
    return next((name for name in ("AVX512", "AVX2", "NEON") if name in known), ", ".join(known))
