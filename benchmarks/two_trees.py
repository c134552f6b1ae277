"""This checkout and another one side by side: the same benchmarks in turns on the same machine, ratios beside their own noise.

A ratio counts as a difference only where it is further from 1 than two runs of one tree are from each other. The trees take turns
in being first, so that a machine which warms up or slows down favours neither.

python -m benchmarks.two_trees OTHER [--only kernels --only decode --only cost] [--rounds 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.environment import ROOT, environment, save

# what runs in a tree: prints its figures as one JSON object, what -> number, on its last line
PROGRAMS = {
    "kernels": """
from benchmarks import gpu_kernels
found = {f"experts, {row['tokens']} tokens, us": row["us"] for row in gpu_kernels.blocks()}
for row in gpu_kernels.rows(1.0, {}):
    what = f"{row['what']}, {row['rows']} x {row['inputs']}, {row['batch']} tokens, us"
    found[what] = row["us"]
""",
    "decode": """
from benchmarks import gpu_decode
make, _, graph = gpu_decode.VARIANTS["apex2"]
cases = ((1, 32), (8, 32), (1, 2048))
found = {}
for row in gpu_decode.rows(gpu_decode.qwen3_6(), "cuda", {"apex2": (make, cases, graph)}):
    what = f"apex2, {row['batch']} x {row['context']}"
    found[f"{what}, ms a step"] = row["step_ms"]
    found[f"{what}, s of prompt a token"] = 1 / row["prefill_tokens_per_s"]
    found["weights, GiB"] = row["weights_gib"]
""",
    "cost": """
import tempfile
from pathlib import Path
from benchmarks import quantize_cost
found = {}
with tempfile.TemporaryDirectory(prefix="kappaquant-cost-") as name:
    source, output = Path(name) / "source", Path(name) / "output"
    source.mkdir()
    quantize_cost.generate(source)
    for effort in ("fast", "best"):
        measured = quantize_cost.run(source, output, effort, 2)
        found[f"quantize, {effort}, s"] = measured["seconds"]
        found[f"quantize, {effort}, CPU s"] = measured["cpu_seconds"]
        found[f"quantize, {effort}, GiB"] = measured["peak_bytes"] / 2**30
""",
}


def figures(tree: Path, kind: str) -> dict[str, float]:
    """One run of a benchmark in a tree, in a process of its own."""
    program = f"import json\n{PROGRAMS[kind]}\nprint(json.dumps(found))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, stdout=subprocess.PIPE,
        text=True, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(other: list[dict[str, float]], this: list[dict[str, float]]) -> list[dict[str, Any]]:
    """A row for each figure that both trees have: both medians, their ratio, and the larger spread of one tree's own runs."""
    rows = []
    for what in [name for name in this[0] if name in other[0]]:
        values = [[run[what] for run in runs] for runs in (other, this)]
        before, now = map(statistics.median, values)
        noise = max((max(v) - min(v)) / statistics.median(v) for v in values)
        rows.append({"what": what, "other": before, "this": now, "ratio": now / before, "noise": noise})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the root of another checkout")
    parser.add_argument("--only", action="append", choices=PROGRAMS, help="a benchmark; may be given several times")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each tree, in turns")
    options = parser.parse_args()
    console = Console(width=130)
    for kind in options.only or PROGRAMS:
        about = environment("cpu" if kind == "cost" else "cuda")
        runs: dict[Path, list[dict[str, float]]] = {options.other.resolve(): [], ROOT: []}
        for turn in range(options.rounds):
            for tree in list(runs)[:: -1 if turn % 2 else 1]:
                runs[tree].append(figures(tree, kind))
        rows = compared(*runs.values())
        table = Table("", "other", "this", "ratio", "noise", title=f"{kind}: lower is better", title_justify="left")
        for row in rows:
            table.add_row(
                row["what"], f"{row['other']:.4g}", f"{row['this']:.4g}", f"{row['ratio']:.3f}", f"{row['noise']:.3f}"
            )
        console.print(table)
        ratios = [row["ratio"] for row in rows]
        beyond = [row["what"] for row in rows if abs(row["ratio"] - 1) > row["noise"]]
        console.print(
            f"{kind}: median ratio {statistics.median(ratios):.3f}, of {len(rows)} figures {len(beyond)} beyond their noise"
        )
        print(save(f"two_trees_{kind}", {"environment": about, "rounds": options.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
