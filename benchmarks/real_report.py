"""The tables and the pictures of benchmarks/results/real_model.json: divergence against the bits of the matrices, and against megabytes.

python -m benchmarks.real_report
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from scipy.stats import spearmanr

from benchmarks.environment import RESULTS, ROOT
from benchmarks.real_picture import BITS, SIZE, draw

RESULT, PAGE = RESULTS / "real_model.json", ROOT / "docs" / "real_model.md"
DITHERED = RESULTS / "real_model_dithered.json"
PICTURES = {ROOT / "docs" / "real_model.png": BITS, ROOT / "docs" / "real_model_size.png": SIZE}
HEAD = (
    "variant", "calibrated", "bits/weight of the matrices", "MB of the model", "KLD (95 %)", "same top token", "perplexity",
)  # fmt: skip
#: what README puts beside plans by measurement
BESIDE = ("llama.cpp*", "calibrated ? g64, embedding 8", "calibrated apex2*", "calibrated kurtosis*")
MEASURED = "measured, bytes of "
MEASURED_BOTH = "measured in both kinds, bytes of "
FAMILIES = {MEASURED: "bits by measurement", MEASURED_BOTH: "and kinds"}
PAIRS = ("MB", "beside", "its KLD")
BOTH = ("variant", "calibrated", "bits/weight of the matrices", "MB of the model", "KLD as it is", "KLD, dithered")
#: README's rows of ours, where they have been measured
OURS = (
    "uniform 3 g64", "own text 3 g64", "calibrated 3 g64", "calibrated trellis 3 g64", "own text 4 g64", "calibrated 4 g64",
    "calibrated trellis 4 g64",
)  # fmt: skip
NEAR = 0.5  # bits a weight between two rows that README puts side by side


def table(result: dict[str, Any]) -> str:
    """All rows by the bits of their matrices, as Markdown; what could not be made comes last."""
    made = sorted((r for r in result["rows"] if "absent" not in r), key=lambda r: r["matrix_bits_per_weight"])
    rows = [cells(row) for row in made]
    rows += [[r["name"], *["–"] * 5, r["absent"]] for r in result["rows"] if "absent" in r]
    return "\n".join(f"| {' | '.join(line)} |" for line in (HEAD, ["---"] * len(HEAD), *rows))


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table."""
    kld = row["kld_nats"]
    low, high = kld["interval_95"]
    name = f"**{row['name']}**" if row["group"] == "kappaquant" else row["name"]
    return [
        name, "yes" if row["calibrated"] else "no", f"{row['matrix_bits_per_weight']:.3f}", f"{row['model_bytes'] / 1e6:.1f}",
        f"{kld['mean']:.4f} ({low:.4f} – {high:.4f})", f"{kld['top1_agreement']:.1%}", f"{row['perplexity']['value']:.2f}",
    ]  # fmt: skip


def pairs(result: dict[str, Any], patterns: Sequence[str] = ("*",)) -> str:
    """Plans by measured sensitivity, each beside the row whose bytes it was given if its name matches, as Markdown: of codebooks, and where they
    were made of codebooks and trellis codes."""
    made = {row["name"]: row for row in result["rows"] if "absent" not in row}
    found = []
    for name, row in made.items():
        beside = made.get(name.removeprefix(MEASURED))
        if name.startswith(MEASURED) and beside:
            weighted = made.get(f"{beside['name']} imatrix")  # the same bytes
            others = [other for other in (beside, weighted) if other]
            found += [(o, row) for o in others if any(fnmatchcase(o["name"], pattern) for pattern in patterns)]
    found.sort(key=lambda pair: pair[0]["model_bytes"])
    families = [f for f in (MEASURED, MEASURED_BOTH) if any(name.startswith(f) for name in made)]
    head = [*PAIRS, *(cell for family in families for cell in (FAMILIES[family], "ratio"))]
    lines = [head, ["---"] * len(head)]
    for other, row in found:
        theirs = other["kld_nats"]["mean"]
        line = [f"{other['model_bytes'] / 1e6:.1f}", other["name"], f"{theirs:.4f}"]
        for family in families:
            ours = made.get(row["name"].replace(MEASURED, family), {}).get("kld_nats", {}).get("mean")
            line += [f"**{ours:.4f}**", f"{ours / theirs:.2f}"] if ours else ["–", "–"]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def predictions(result: dict[str, Any]) -> str:
    """How well the evidence predicted: rank correlation, and measured over predicted divergence from the least to the most."""
    both = [(r["predicted_kld"], r["kld_nats"]["mean"]) for r in result["rows"] if "predicted_kld" in r]
    rank = spearmanr(both).statistic
    ratios = sorted(measured / predicted for predicted, measured in both)
    return (
        f"{len(both)} plans of 2 to 8 bits: rank correlation of predicted and measured divergence {rank:.3f}; measured over predicted "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}, in the middle {ratios[len(ratios) // 2]:.2f}."
    )


def grid(result: dict[str, Any], dithered: dict[str, Any]) -> str:
    """Rows of the model whose old grid was taken away, beside the same rows with it, as Markdown."""
    with_grid = {row["name"]: row for row in result["rows"] if "absent" not in row}
    made = sorted(
        (row for row in dithered["rows"] if "absent" not in row), key=lambda r: (r["matrix_bits_per_weight"], r["name"])
    )
    lines = [list(BOTH), ["---"] * len(BOTH)]
    for row in made:
        lines.append([*cells(row)[:4], *(f"{r['kld_nats']['mean']:.4f}" for r in (with_grid[row["name"]], row))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def caption(result: dict[str, Any], up: str = "../") -> str:
    """What the table was measured on; ``up``: from the page to the root."""
    return (
        f"{result['tokens']:,} predicted tokens; perplexity of the original in float32: {result['original']['value']:.2f}; "
        f"on CPUs and an H200, as each row says ([{RESULT.name}]({up}benchmarks/results/{RESULT.name}))."
    )


def headline(result: dict[str, Any]) -> str:
    """README's table: rows of ours, and of every other kind the best within ``NEAR`` bits of one of them."""
    made = [row for row in result["rows"] if "absent" not in row]
    ours = [row for row in made if row["name"] in OURS]
    best: dict[tuple[str, bool, float], dict[str, Any]] = {}
    for width in {row["matrix_bits_per_weight"] for row in ours}:
        for row in made:
            if row["group"] != "kappaquant" and abs(row["matrix_bits_per_weight"] - width) <= NEAR:
                key = row["group"], row["calibrated"], width
                best[key] = min(best.get(key, row), row, key=lambda r: r["kld_nats"]["mean"])
    beside = {row["name"]: row for row in (*ours, *best.values())}
    ordered = sorted(beside.values(), key=lambda r: (r["matrix_bits_per_weight"], r["calibrated"]))
    kept = [at for at, title in enumerate(HEAD) if title not in ("MB of the model", "same top token")]
    lines = [HEAD, ["---"] * len(HEAD), *map(cells, ordered)]
    shown = "\n".join(f"| {' | '.join(line[at] for at in kept)} |" for line in lines)
    written = " Own text: calibrated on what the model wrote itself." if any("own text" in n for n in beside) else ""
    return f"{shown}\n\n{caption(result, '')}{written}"


def page(text: str, result: dict[str, Any], dithered: dict[str, Any]) -> str:
    """The document with its tables made anew."""
    for what, block in (
        ("table", f"{table(result)}\n\n{caption(result)}"),
        ("pairs", f"{pairs(result)}\n\n{predictions(result)}"),
        ("dithered", grid(result, dithered)),
    ):
        begin, end = f"<!-- {what} -->\n", f"\n<!-- /{what} -->"
        before, found, rest = text.partition(begin)
        after = rest.partition(end)[2]
        if not found or not after:
            raise SystemExit(f"{PAGE.name} needs a block between {begin.strip()} and {end.strip()}")
        text = f"{before}{begin}{block}{end}{after}"
    return text


def main() -> None:
    result, dithered = (json.loads(path.read_text(encoding="utf-8")) for path in (RESULT, DITHERED))
    for path, picture in PICTURES.items():
        draw(result, path, picture)
    print(
        f"{table(result)}\n\n{caption(result)}\n\n{pairs(result)}\n\n{predictions(result)}\n\n{grid(result, dithered)}"
    )
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), result, dithered), encoding="utf-8")


if __name__ == "__main__":
    main()
