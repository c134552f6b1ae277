"""Draw the share of the roofline that products reach, by batch, from results/gpu_kernels.json into docs/roofline.png.

The roofline of a product is the longer of two times: its bytes at the card's measured read ceiling, and its multiplications
at cuBLAS's rate on a large bf16 matrix. Bytes are the weight's own, so 3 bits have the lower floor.

python -m benchmarks.gpu_plot
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT

SHAPE = (28672, 4096)
PICTURE = ROOT / "docs" / "roofline.png"
BITS = {"bf16 (cuBLAS)": 16.0, "int4 (tinygemm)": 4.25, "int4 (GemLite)": 4.25, "nf4 (bitsandbytes)": 4.5}


def shares(result: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Name -> (batch, share of the roofline), for every product of ``SHAPE`` with several batches."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    int8 = {row["batch"] for row in result["rows"] if row["what"] == "3 bits, int8"}
    for row in result["rows"]:
        if (row["rows"], row["inputs"]) != SHAPE:
            continue
        name, kind = row["what"], row["what"].partition(", ")[2]
        if kind and not name.startswith(("3 bits", "4 bits")):
            continue
        if kind == "float16" and (row["batch"] <= 16 or row["batch"] in int8):
            continue  # int8 is the default there
        bits = BITS.get(name, int(name[0]) + 0.125 if kind else 0.0)
        n, k = SHAPE
        nbytes = n * k * bits / 8 + 2 * row["batch"] * (n + k)
        reading = nbytes / result["read_ceiling_tb_per_s"] / 1e6
        computing = 2 * n * k * row["batch"] / result["matmul_ceiling_tflops"] / 1e6
        found[name.partition(",")[0]].append((row["batch"], max(reading, computing) / row["us"]))
    return found


def draw(result: dict[str, Any], path: Path = PICTURE) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, points in shares(result).items():
        batch, share = zip(*sorted(points), strict=True)
        ours = name.endswith(" bits")
        axes.plot(
            batch, [100 * s for s in share], marker="o", lw=2.2 if ours else 1.2, ls="-" if ours else "--", label=name
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := sorted({r["batch"] for r in result["rows"]}), [str(t) for t in ticks])
    axes.set(xlabel="tokens in a batch", ylabel="share of the roofline, %", ylim=(0, 115))
    axes.set_title(f"{SHAPE[0]} x {SHAPE[1]} on {result['environment']['device']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    draw(json.loads((RESULTS / "gpu_kernels.json").read_text(encoding="utf-8")))
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
