"""No option is ignored: one that would be of no effect is refused by name, before anything is read or loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import run_here
from tiny_checkpoints import quantize
from tiny_models import save_tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("unused")
    source = save_tiny("llama", root / "source")
    (root / "plan.json").write_text("never read")
    return {
        "source": source,
        "checkpoint": quantize(source, root / "checkpoint"),
        "plan": root / "plan.json",
        "root": root,
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "plan {source} --bits 4 --thresholds 1",
            "--bits of uniform, --thresholds of kurtosis; give those of one policy",
        ),
        ("plan {source} --recipe apex --ladder 3,4", "--recipe of recipe, --ladder of kurtosis"),
        ("plan {source} --policy uniform --recipe apex", "option 'recipe': the uniform policy has no such option"),
        ("plan {source} --policy uniform --size 1GB", "the uniform policy keeps to no size"),
        ("plan {source} --context 4096", "--context: is of no effect without --fit"),
        ("plan {source} --measured x", "give --explore as well"),
        ("plan {source} --revision main", "applies to a Hub id"),
        ("quantize {source} -o {root}/out --stream", "--stream: is of no effect on"),
        ("scan {source} --stream", "--stream: is of no effect on"),
        ("export {source} -o {root}/out --stream", "--stream: is of no effect on"),
        ("export {checkpoint} -o {root}/out --revision main", "--revision main applies to a Hub id"),
        ("export {checkpoint} -o {root}/out --bits 4", "--bits does not change the bits that the checkpoint has"),
        *(
            (
                f"quantize {{source}} -o {{root}}/out --plan {{plan}} {option}",
                f"{option.split()[0]} does not change the plan file",
            )
            for option in (
                "--policy uniform",
                "--bits 3",
                "--recipe apex",
                "--thresholds 1,2,3",
                "--profile p.json",
                "--evidence e.json",
                "--size 1GB",
                "--bits-per-weight 4",
                "--active 1GB",
                "--fit 1GB",
                "--context 9",
                "--group-size 64",
                "--set *=4",
                "--fuse-legal",
            )
        ),
        *(
            (
                f"export {{source}} -o {{root}}/out --plan {{plan}} {option}",
                f"{option.split()[0]} does not change the plan file",
            )
            for option in ("--policy uniform", "--bits 3", "--profile p.json")
        ),
        *(
            (f"{command} --source {{source}}", "--source")
            for command in ("inspect {checkpoint}", "verify {checkpoint}", "dequantize {checkpoint} -o {root}/out")
        ),
        *(
            (f"{command} {option}", f"{option}: is of no effect at temperature 0")
            for command in ("generate {checkpoint} two", "chat {checkpoint}")
            for option in ("--top-p 0.9", "--top-k 5", "--min-p 0.1", "--seed 1")
        ),
        *(
            (f"evaluate {{checkpoint}} --against {{source}} {option}", f"{option}: is of no effect without --task")
            for option in (
                "--questions 3",
                "--shots 1",
                "--max-tokens 9",
                "--chat-template",
                "--task-batch 2",
                "--shots-from x",
            )
        ),
        ("evaluate {checkpoint} --against {source} --context 32", "--context 32: is of no effect without --throughput"),
        ("compare {checkpoint} --revision main", "--revision main: is of no effect without --against"),
        ("calibrate {source} -o {root}/e.json --data-free --bits 3", "--bits 3: is of no effect with --data-free"),
        (
            "calibrate {source} -o {root}/e.json --data-free --effort best",
            "--effort best: is of no effect with --data-free",
        ),
        ("serve {checkpoint} --mlx --engine vllm", "contradicts --engine vllm"),
        ("inspect {checkpoint} --expert-parallel", "give --tp too"),
        ("quantize {source} -o {root}/out --calibration-tokens 9", "of no effect without --calibration"),
    ],
)
def test_what_would_do_nothing_is_refused(folders: dict[str, Path], arguments: str, said: str) -> None:
    before = sorted(folders["root"].iterdir())
    done = run_here(*(word.format(**folders) for word in arguments.split()))
    assert done.returncode == 2
    assert said in done.stderr
    assert sorted(folders["root"].iterdir()) == before
