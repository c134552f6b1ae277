"""Runs vLLM with and without its MTP head in a process of its own: python vllm_drafts.py SPEC OUT; ``generate`` is the other end.

SPEC is JSON: prompts (token ids) and runs, each the options of an ``LLM``. OUT gets, for each run, the tokens of every answer,
and how many tokens were drafted and accepted.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_engine import environment

DRAFT = {"method": "mtp", "num_speculative_tokens": 1}


@dataclass(frozen=True)
class Run:
    """What one engine answered, how often it drafted, and how many drafted tokens it accepted."""

    answers: list[list[int]]
    drafts: int
    accepted: int

    @property
    def length(self) -> float:
        """Mean accepted length: tokens gained by a step that checks a draft, the one of the model itself included."""
        return 1 + self.accepted / self.drafts


def generate(folder: Path, prompts: list[list[int]], runs: list[dict[str, Any]]) -> list[Run]:
    """What ``main`` saves for these runs; AssertionError with the end of its output if it fails."""
    spec, out = folder / "spec.json", folder / "out.json"
    spec.write_text(json.dumps({"prompts": prompts, "runs": runs}))
    command = [sys.executable, __file__, str(spec), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return [Run(**run) for run in json.loads(out.read_text())]


def main(spec_path: str, out: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    spec, results = json.loads(Path(spec_path).read_text()), []
    prompts = [{"prompt_token_ids": prompt} for prompt in spec["prompts"]]
    for options in spec["runs"]:
        llm = LLM(**{"dtype": "bfloat16", "max_model_len": 256, "seed": 0, "disable_log_stats": False, **options})
        made = llm.generate(prompts, SamplingParams(max_tokens=72, temperature=0, detokenize=False), use_tqdm=False)
        counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        results.append(
            {
                "answers": [list(answer.outputs[0].token_ids) for answer in made],
                "drafts": counts.get("vllm:spec_decode_num_drafts", 0),
                "accepted": counts.get("vllm:spec_decode_num_accepted_tokens", 0),
            }
        )
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
