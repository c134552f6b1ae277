"""One variant of one model in vLLM's engine, or in kappaquant's own decoder, in a process of its own that answers another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import kernel_times

CONTEXT, FEW, MANY = 32, 8, 136
PROFILED = 32  # steps
SHOWN = 25  # kernels

Asked = list[list[int]]


@dataclass(frozen=True)
class Engine:
    """A loaded model.

    Attributes:
        seconds: what it takes for prompts and so many new tokens each.
        profiled: what the GPU does then.
        resident: bytes of its weights' tensors.
        vocabulary: how many tokens there are.
    """

    seconds: Callable[[Asked, int], float]
    profiled: Callable[[Asked, int], kernel_times.Work]
    resident: int
    vocabulary: int

    def asked(self, batch: int, context: int) -> Asked:
        """Random prompts, the same each time."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(100, self.vocabulary, (batch, context), generator=generator).tolist()


def answer(connection: Connection, spec: dict[str, Any]) -> None:
    """Load, send the bytes of the weights, then answer "times" and "kernels" until the other end is closed.

    Args:
        spec: ``model`` (a folder), ``engine`` ("vllm" or "kappaquant"), ``options`` of an ``LLM``, ``batches``, and ``prompts``
            as [rows, tokens] each.
    """
    os.dup2(2, 1)  # what engines print is no result
    engine = (_own if spec["engine"] == "kappaquant" else _vllm)(spec)
    connection.send(engine.resident)
    answers = {"times": times, "kernels": kernels}
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        connection.send(answers[asked](engine, spec))


def times(engine: Engine, spec: dict[str, Any]) -> dict[str, list[float]]:
    """Milliseconds as a user sees them: of a ``step`` at each batch, and to the first token of each of ``prompts``."""
    steps, prompts = [], []
    for batch in spec["batches"]:
        asked = engine.asked(batch, CONTEXT)
        engine.seconds(asked, FEW)
        short, long = (engine.seconds(asked, new) for new in (FEW, MANY))
        steps.append(round((long - short) / (MANY - FEW) * 1e3, 3))
    for batch, context in spec["prompts"]:
        asked = engine.asked(batch, context)
        engine.seconds(asked, 1)
        prompts.append(round(min(engine.seconds(asked, 1) for _ in range(2)) * 1e3, 2))
    return {"step": steps, "prompt": prompts}


def kernels(engine: Engine, spec: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What the GPU does for the same: milliseconds in which a kernel runs (``busy_ms``), and kernels, by purpose."""
    steps, prompts = [], []
    for batch in spec["batches"]:
        asked = engine.asked(batch, CONTEXT)
        few, many = (engine.profiled(asked, new) for new in (FEW, FEW + PROFILED))
        steps.append(_row(few, many, PROFILED))
    for batch, context in spec["prompts"]:
        nothing = kernel_times.Work({}, 0.0)
        prompts.append(_row(nothing, engine.profiled(engine.asked(batch, context), 1), 1))
    return {"step": steps, "prompt": prompts}


def _row(few: kernel_times.Work, many: kernel_times.Work, steps: int) -> dict[str, Any]:
    found = kernel_times.per_step(few, many, steps)
    return {
        "busy_ms": round((many.busy - few.busy) / steps / 1e3, 3),
        "purposes": kernel_times.by_purpose(found),
        "kernels": found[:SHOWN],
    }


def _vllm(spec: dict[str, Any]) -> Engine:
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
    return Engine(seconds, profiled, resident, llm.llm_engine.model_config.get_vocab_size())


def _own(spec: dict[str, Any]) -> Engine:
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

    return Engine(seconds, profiled, weight_bytes(model), model.config.get_text_config(decoder=True).vocab_size)


def weight_bytes(model: torch.nn.Module) -> int:
    """Of all parameters and buffers, tensors that share memory once; tables of rotary embeddings are no weights."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for name, t in tensors.items()
        if "cos_sin_cache" not in name and t.numel()
    }
    return sum(storages.values())
