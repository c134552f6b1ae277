"""One variant of one model in vLLM's engine, in a process of its own: python -m benchmarks.vllm_engine SPEC OUT READY.

SPEC is JSON: ``model`` (a folder), ``options`` of an ``LLM``, ``batches`` and ``prompts`` ([rows, tokens] each). READY is made when
the model is loaded; measuring begins when standard input ends, so that several may start together and be measured in turn. OUT gets
what ``measure`` says. With ``engine`` "kappaquant" the folder runs in kappaquant's own decoder instead.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernel_times

CONTEXT, FEW, MANY, TIMES = 32, 8, 136, 3
PROFILED = 32  # steps
SHOWN = 25  # kernels


def measure(spec: dict[str, Any], wait: Callable[[], object]) -> dict[str, Any]:
    """Times as a user sees them, and the kernels alone.

    ``steps``: for each batch ms a step, tok/s, ms in which a kernel ran (``busy_ms``), and kernels, by purpose. ``prompts``: ms to the first token. ``resident_gb``:
    the weights' tensors.

    Args:
        wait: called between loading and measuring.
    """
    seconds, profiled, resident, vocabulary = (_own if spec.get("engine") == "kappaquant" else _vllm)(spec)
    wait()
    generator = torch.Generator().manual_seed(0)

    def rows(batch: int, context: int) -> Asked:
        return torch.randint(100, vocabulary, (batch, context), generator=generator).tolist()

    steps, prompts = [], []
    for batch in spec["batches"]:
        asked = rows(batch, CONTEXT)
        seconds(asked, FEW)
        long, short = (min(seconds(asked, new) for _ in range(TIMES)) for new in (MANY, FEW))
        step = (long - short) / (MANY - FEW)
        few, many = (profiled(asked, new) for new in (FEW, FEW + PROFILED))
        found = kernel_times.per_step(few, many, PROFILED)
        steps.append(
            {
                "batch": batch,
                "step_ms": round(step * 1e3, 3),
                "tokens_per_s": round(batch / step, 1),
                "busy_ms": round((many.busy - few.busy) / PROFILED / 1e3, 3),
                "purposes": kernel_times.by_purpose(found),
                "kernels": found[:SHOWN],
            }
        )
        print(spec["name"], steps[-1]["batch"], steps[-1]["step_ms"], steps[-1]["busy_ms"], file=sys.stderr, flush=True)
    for batch, context in spec["prompts"]:
        asked = rows(batch, context)
        seconds(asked, 1)
        first = min(seconds(asked, 1) for _ in range(TIMES + 1))
        prompts.append({"batch": batch, "context": context, "first_token_ms": round(first * 1e3, 2)})
        print(spec["name"], *prompts[-1].values(), file=sys.stderr, flush=True)
    return {"model": spec["name"], "resident_gb": round(resident / 1e9, 3), "steps": steps, "prompts": prompts}


Asked = list[list[int]]
Timer = Callable[[Asked, int], float]
Profiler = Callable[[Asked, int], kernel_times.Work]


def _vllm(spec: dict[str, Any]) -> tuple[Timer, Profiler, int, int]:
    """Seconds that vLLM takes for (prompts, new tokens), and what the GPU does then; bytes of weights; vocabulary."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=spec["model"], dtype="bfloat16", seed=0, skip_tokenizer_init=True, max_model_len=4096, max_num_seqs=256,
        enable_prefix_caching=False, **spec["options"],
    )  # fmt: skip

    def seconds(prompts: Asked, new: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return time.perf_counter() - begin

    def profiled(prompts: Asked, new: int) -> kernel_times.Work:
        llm.collective_rpc(kernel_times.begin)
        seconds(prompts, new)
        (work,) = llm.collective_rpc(kernel_times.end)
        return kernel_times.Work.of(work)

    (resident,) = llm.apply_model(weight_bytes)
    return seconds, profiled, resident, llm.llm_engine.model_config.get_vocab_size()


def _own(spec: dict[str, Any]) -> tuple[Timer, Profiler, int, int]:
    """The same of kappaquant's own decoder."""
    import kappaquant
    from kappaquant.runtime.decoding import Decoder
    from kappaquant.runtime.sampling import Sampler, Sampling

    model: Any = kappaquant.load(spec["model"], device="cuda")[0]
    held: dict[tuple[int, int], Decoder] = {}
    sampler = Sampler(Sampling(), torch.device("cuda"))

    def seconds(prompts: Asked, new: int) -> float:
        ids = torch.tensor(prompts, device="cuda")
        shape = len(prompts), len(prompts[0])
        if shape not in held:
            held.clear()
            held[shape] = Decoder(model, shape[0], shape[1] + MANY + 1)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        token = sampler(held[shape].prefill(ids))
        for _ in range(new - 1):
            token = sampler(held[shape].step(token))
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    def profiled(prompts: Asked, new: int) -> kernel_times.Work:
        kernel_times.begin()
        seconds(prompts, new)
        return kernel_times.Work.of(kernel_times.end())

    return seconds, profiled, weight_bytes(model), model.config.get_text_config(decoder=True).vocab_size


def weight_bytes(model: torch.nn.Module) -> int:
    """Of all parameters and buffers, tensors that share memory once; tables of rotary embeddings are no weights."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for name, t in tensors.items()
        if "cos_sin_cache" not in name and t.numel()
    }
    return sum(storages.values())


def main() -> None:
    spec, out, ready = map(Path, sys.argv[1:])

    def wait() -> None:
        ready.touch()
        sys.stdin.read()

    out.write_text(json.dumps(measure(json.loads(spec.read_text()), wait)))


if __name__ == "__main__":
    main()
