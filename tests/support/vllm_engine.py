"""Runs vLLM's engine in a process of its own: python vllm_engine.py SPEC OUT; ``ask`` is the other end.

SPEC is JSON: prompts (token ids), runs, each the options of an ``LLM``, and how to sample. OUT gets, for each run, per prompt the tokens
and the log-probabilities of every position (of all tokens, or of those that came), and the bytes of all tensors each rank's model holds.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 96  # of tests/tiny_models
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # apply_model sends a function
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def environment(**more: str) -> dict[str, str]:
    """For processes with vLLM: loopback only, one thread, no telemetry."""
    return {**os.environ, **ENVIRONMENT, **more}


WHOLE = {"max_tokens": 4, "ignore_eos": True, "logprobs": VOCABULARY, "prompt_logprobs": VOCABULARY}


def ask(
    folder: Path, prompts: list[list[int]], runs: list[dict[str, Any]], sampling: dict[str, Any] = WHOLE
) -> list[dict[str, Any]]:
    """What ``main`` saves for these runs; AssertionError with the end of its output if it fails."""
    spec, out = folder / "spec.json", folder / "out.pt"
    spec.write_text(json.dumps({"prompts": prompts, "runs": runs, "sampling": sampling}))
    command = [sys.executable, __file__, str(spec), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return torch.load(out)


def resident_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of each tensor a model holds, tensors that share memory once."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    storages = {
        tensor.untyped_storage().data_ptr(): (name, tensor) for name, tensor in tensors.items() if tensor.numel()
    }
    return {name: tensor.untyped_storage().nbytes() for name, tensor in storages.values()}


def main(spec_path: str, out: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    spec, results = json.loads(Path(spec_path).read_text()), []
    sampling = SamplingParams(temperature=0, detokenize=False, **spec["sampling"])
    for options in spec["runs"]:
        llm = LLM(
            **{"max_model_len": 128, "max_logprobs": VOCABULARY, "skip_tokenizer_init": True, "seed": 0, **options}
        )
        made = llm.generate([{"prompt_token_ids": prompt} for prompt in spec["prompts"]], sampling, use_tqdm=False)
        results.append(
            {
                "tokens": [[*answer.prompt_token_ids, *answer.outputs[0].token_ids] for answer in made],
                "prompt_tokens": [len(answer.prompt_token_ids) for answer in made],
                "logprobs": [table(answer, sampling.logprobs) for answer in made],
                "resident": llm.apply_model(resident_bytes),
            }
        )
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    torch.save(results, out)


def table(answer: Any, logprobs: int | None) -> torch.Tensor | None:
    """From vLLM's dictionaries: [positions, VOCABULARY], or [positions] of the tokens that came, which ``logprobs=0`` asks for."""
    if logprobs is None:
        return None
    positions = [*(answer.prompt_logprobs or [None])[1:], *answer.outputs[0].logprobs]
    if logprobs:
        return torch.tensor([[found[token].logprob for token in range(VOCABULARY)] for found in positions])
    ids = [
        *answer.prompt_token_ids[1 if answer.prompt_logprobs else len(answer.prompt_token_ids) :],
        *answer.outputs[0].token_ids,
    ]
    return torch.tensor([found[token].logprob for found, token in zip(positions, ids, strict=True)])


if __name__ == "__main__":
    main(*sys.argv[1:])
