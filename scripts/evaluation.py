"""The commands around evaluation on the reference model, offline and timed: two checkpoints measured, compared, one with a card.

python -m scripts.evaluation [FOLDER]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

MODEL = Path(__file__).parents[1] / "reference" / "model"
PLANS = {"uniform3": ("--policy", "uniform", "--bits", "3"), "apex2": ("--recipe", "apex2")}
MEASURED = ("--task", "arithmetic_stories", "--throughput", "--by-layer")


def main() -> None:
    work = Path(sys.argv[1] if len(sys.argv) > 1 else "demo/evaluation").absolute()
    work.mkdir(parents=True, exist_ok=True)
    model, console, start = str(MODEL), Console(), time.perf_counter()

    def kappaquant(*arguments: str) -> None:
        begin = time.perf_counter()
        command = [sys.executable, "-P", "-c", "from kappaquant.cli import main; main()", *arguments]
        subprocess.run(command, cwd=work, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        console.print(
            f"[bold]{time.perf_counter() - begin:.0f} s: kappaquant {' '.join(arguments)}[/bold]", soft_wrap=True
        )

    for name, options in PLANS.items():
        kappaquant("plan", model, *options, "-o", f"{name}.json")
        kappaquant("quantize", model, name, "--plan", f"{name}.json")
        kappaquant("evaluate", name, "--against", model, *MEASURED)
    kappaquant("compare", *PLANS, "--plot", "pareto.png")
    kappaquant("card", "apex2")
    console.print(f"{time.perf_counter() - start:.0f} s in all; {work}", soft_wrap=True)


if __name__ == "__main__":
    main()
