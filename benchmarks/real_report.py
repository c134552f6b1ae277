"""The table and the picture of benchmarks/results/real_model.json: divergence against the bits of the matrices.

python -m benchmarks.real_report [RESULT.json] [PICTURE.png]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT

RESULT, PICTURE, PAGE = RESULTS / "real_model.json", ROOT / "docs" / "real_model.png", ROOT / "docs" / "real_model.md"
HEAD = (
    "variant", "calibrated", "bits/weight of the matrices", "MB of the model", "KLD (95 %)", "same top token", "perplexity",
)  # fmt: skip
BEGIN, END = "<!-- table -->\n", "\n<!-- /table -->"
#: (what lines join: group and whether calibrated) -> name, marker
SERIES = {
    ("kappaquant", False): ("kappaquant", "o"),
    ("kappaquant", True): ("kappaquant, calibrated", "D"),
    ("llama.cpp", False): ("llama.cpp files", "s"),
    ("llama.cpp", True): ("llama.cpp files, imatrix", "s"),
    ("llama.cpp type", False): ("llama.cpp types", "v"),
    ("llama.cpp type", True): ("llama.cpp types, imatrix", "^"),
    ("peer", False): ("HQQ, bitsandbytes", "x"),
    ("rounding", False): ("round to nearest", "+"),
    ("calibrated peer", True): ("GPTQ, AutoRound", "*"),
}


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


def caption(result: dict[str, Any]) -> str:
    """What the table was measured on."""
    return (
        f"{result['tokens']:,} predicted tokens; perplexity of the original in float32: {result['original']['value']:.2f}. "
        f"{result['environment']['cores']} CPU cores ([{RESULT.name}](../benchmarks/results/{RESULT.name}))."
    )


def series(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, bool], list[tuple[float, float, str]]]:
    """(group, calibrated) -> (bits of the matrices, KLD, name), by bits."""
    found: dict[tuple[str, bool], list[tuple[float, float, str]]] = {key: [] for key in SERIES}
    for row in rows:
        if "absent" not in row:
            point = row["matrix_bits_per_weight"], row["kld_nats"]["mean"], row["name"]
            found[row["group"], row["calibrated"]].append(point)
    return {key: sorted(points) for key, points in found.items() if points}


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for key, points in series(result["rows"]).items():
        name, marker = SERIES[key]
        bits, kld, _ = zip(*points, strict=True)
        joined = key[0] in ("kappaquant", "llama.cpp type", "calibrated peer")
        style = "-" if key[0] == "kappaquant" else ":" if joined else "none"
        axes.plot(bits, kld, marker=marker, ls=style, lw=1.6 if key[0] == "kappaquant" else 1, label=name)
    axes.set_yscale("log")
    axes.set(xlabel="bits per weight of the matrices", ylabel="KL divergence from float32, nats")
    axes.set_title("SmolLM2-135M-Instruct", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
