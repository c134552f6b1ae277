"""Whether this checkout and another one write the same bytes: the demo's plans, both containers, one and two jobs, resumed runs.

Plans come from the other tree, so that they are read here as well. A resumed run is one that the other tree began, that was killed
after some lines of its journal, and that this tree goes on with. Ends with exit code 1 where a byte differs.

python -m benchmarks.same_bytes OTHER [--model reference/model]
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from itertools import count
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.environment import ROOT

PLANS = {  # those of scripts/demo.py, and one with all that a plan can say
    "uniform 2": ["--policy", "uniform", "--bits", "2"],
    "uniform 3": ["--policy", "uniform", "--bits", "3"],
    "recipe apex2": ["--policy", "recipe", "--recipe", "apex2"],
    "kurtosis": ["--policy", "kurtosis", "--profile", "{profile}"],
    "overridden": [
        "--policy",
        "recipe",
        "--recipe",
        "apex3",
        "--group-size",
        "64",
        "--fuse-legal",
        "--set",
        "*down*=5",
    ],
}
CONTAINERS = ("kappaquant", "tq3_native")
KILLED_AFTER = (2, 5, 20, 40)  # lines of the journal: only the fingerprint and a shard, up to most of the tensors
# time flies in a run that is to be killed, so that each piece is vouched for at once and not every two seconds
HASTY = (
    "import itertools, time; time.monotonic = itertools.count(0, 10).__next__; from kappaquant.cli import main; main()"
)


def environ(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree)}


def command(tree: Path, *arguments: str | Path) -> str:
    """Run a tree's command; what it wrote to standard error where it failed, else nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "kappaquant.cli", *map(str, arguments)], cwd=tree, env=environ(tree), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def killed(tree: Path, lines: int, output: Path, *arguments: str | Path) -> int:
    """Run a tree's command and kill it once the journal of its output has so many lines; how many there were then."""
    journal = output.with_name(f"{output.name}.partial") / "journal.jsonl"
    arguments = ("quantize", *arguments)
    run = subprocess.Popen(
        [sys.executable, "-c", HASTY, *map(str, arguments)], cwd=tree, env=environ(tree), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while run.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
            os.killpg(run.pid, signal.SIGKILL)
        time.sleep(0.0002)
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def kind(problem: str) -> list[str]:
    """The type of an error and what it names: how it goes on may have been worded better since."""
    return problem.split(": ")[:3]


def outcomes(other: Path, model: Path, scratch: Path) -> Iterator[tuple[str, str, str]]:
    """(plan, what was run, how it compares) for each run; an outcome that begins with "same" is good."""
    profile, numbers = scratch / "profile.json", count()
    if problem := command(other, "scan", model, "-o", profile):
        raise SystemExit(problem)
    for name, options in PLANS.items():
        plan = scratch / f"{name}.json"
        if problem := command(other, "plan", model, *(o.format(profile=profile) for o in options), "-o", plan):
            raise SystemExit(problem)
        for container in CONTAINERS:
            settings: list[str | Path] = ["--plan", plan, "--format", container]
            expected = scratch / f"{next(numbers)}"
            refused = command(other, "quantize", model, expected, *settings, "--jobs", "1")
            for jobs in ("1", "2"):
                output = scratch / f"{next(numbers)}"
                problem = command(ROOT, "quantize", model, "-o", output, *settings, "--jobs", jobs)
                if refused or problem:
                    same = "same refusal" if kind(refused) == kind(problem) else f"DIFFERENT: {refused}; {problem}"
                else:
                    same = "same bytes" if digests(output) == digests(expected) else "DIFFERENT bytes"
                yield name, f"{container}, {jobs} jobs", same
            for lines in () if refused else KILLED_AFTER:
                output = scratch / f"{next(numbers)}"
                there = killed(other, lines, output, model, output, *settings, "--jobs", "2")
                problem = command(ROOT, "quantize", model, "-o", output, *settings, "--jobs", "2")
                same = "same bytes" if not problem and digests(output) == digests(expected) else f"DIFFERENT: {problem}"
                yield name, f"{container}, killed at line {there} and resumed", same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the root of another checkout")
    parser.add_argument("--model", type=Path, default=ROOT / "reference" / "model", help="the source to quantize")
    options = parser.parse_args()
    table = Table("plan", "run", "outcome", title="this tree against another", title_justify="left")
    with tempfile.TemporaryDirectory(prefix="kappaquant-bytes-") as scratch:
        found = list(outcomes(options.other.resolve(), options.model.resolve(), Path(scratch)))
    for row in found:
        table.add_row(*row)
    Console(width=130).print(table)
    different = [row for row in found if not row[2].startswith("same")]
    print(f"{len(found) - len(different)} of {len(found)} the same")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
