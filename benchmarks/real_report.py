"""The table and the picture of benchmarks/results/real_model.json: divergence against the bits of the matrices.

python -m benchmarks.real_report [RESULT.json] [PICTURE.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT
from benchmarks.real_picture import draw

RESULT, PICTURE, PAGE = RESULTS / "real_model.json", ROOT / "docs" / "real_model.png", ROOT / "docs" / "real_model.md"
HEAD = (
    "variant", "calibrated", "bits/weight of the matrices", "MB of the model", "KLD (95 %)", "same top token", "perplexity",
)  # fmt: skip
BEGIN, END = "<!-- table -->\n", "\n<!-- /table -->"
#: README's rows of ours, where they have been measured
OURS = ("uniform 3 g64", "own text 3 g64", "calibrated 3 g64", "own text 4 g64", "calibrated 4 g64")
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


def caption(result: dict[str, Any], up: str = "../") -> str:
    """What the table was measured on; ``up``: from the page to the root."""
    return (
        f"{result['tokens']:,} predicted tokens; perplexity of the original in float32: {result['original']['value']:.2f}. "
        f"{result['environment']['cores']} CPU cores ([{RESULT.name}]({up}benchmarks/results/{RESULT.name}))."
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


def page(text: str, result: dict[str, Any]) -> str:
    """The document with its table made anew."""
    before, found, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    if not found or not after:
        raise SystemExit(f"{PAGE.name} needs a block between {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}{table(result)}\n\n{caption(result)}{END}{after}"


def main() -> None:
    result = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else RESULT).read_text(encoding="utf-8"))
    draw(result, Path(sys.argv[2]) if len(sys.argv) > 2 else PICTURE)
    print(f"{table(result)}\n\n{caption(result)}")
    if len(sys.argv) == 1:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
