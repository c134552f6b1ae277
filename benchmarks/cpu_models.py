"""Models of kappaquant and of llama.cpp on a CPU, in turns: layers of the large shape, and a small model with real weights end to end."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kappaquant
from benchmarks import cpu_gguf
from benchmarks.cpu_engines import Engine, LlamaCpp, Ours
from benchmarks.cpu_turns import Times, in_turns
from benchmarks.gpu_decode import held_bytes, qwen3_6
from benchmarks.random_model import packed, token_bytes
from benchmarks.real_llamacpp import absent, quantize_file
from benchmarks.real_weights import FLOATS

Row = dict[str, Any]
CONTEXT, PROMPT = 32, 512
WARM, STEPS = 4, 16  # tokens after each short prompt, the first of them not counted
ROOM = 1024  # tokens that a cache holds
VOCABULARY = 1024  # of the layers' models: what is measured is layers
PLANS: dict[str, dict[str, Any]] = {
    "uniform 4": {"policy": "uniform", "bits": 4},
    "uniform 3": {"policy": "uniform", "bits": 3},
    "trellis 3": {"policy": "uniform", "bits": 3, "kinds": ("t",)},
    "apex2": {"policy": "recipe", "recipe": "apex2"},
}
SMALL_PLANS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4},
    "4 bits, embedding 6": {"bits": 4, "overrides": (("*embed_tokens.weight", 6),)},
}
LLAMA = "llama.cpp "
LAYERS = (*PLANS, f"{LLAMA}Q4_K_M", f"{LLAMA}Q3_K_M")
SMALL = (*SMALL_PLANS, f"{LLAMA}Q4_K_M")


@dataclass(frozen=True)
class Model:
    """One that is measured.

    Attributes:
        nbytes: of weights that decoding one token reads.
    """

    engine: Engine
    nbytes: int


Making = Callable[[], Model]


def layers(names: Iterable[str], count: int, threads: int, rounds: int, work: Path) -> Iterator[Row]:
    """Milliseconds of one layer, for ``count`` of them: what a model takes longer than one that has so many fewer.

    Args:
        names: of ``LAYERS``.
        work: a folder for GGUF files.
    """
    fewer, more = (_config(cpu_gguf.FEWEST + extra) for extra in (0, count))
    makings: dict[str, Making] = {}
    for name in names:
        for depth, config in (("fewer", fewer), ("more", more)):
            make = (
                partial(_random_llama, name.removeprefix(LLAMA), threads, work)
                if name.startswith(LLAMA)
                else partial(_random_ours, name)
            )
            makings[f"{name}/{depth}"] = partial(make, config)
    with _made(makings) as models:
        for what, tokens, times in _measured(models, rounds):
            each = {
                name: times[f"{name}/more"].less(times[f"{name}/fewer"], count)
                for name in names
                if f"{name}/more" in times
            }
            nbytes = {name: (models[f"{name}/more"].nbytes - models[f"{name}/fewer"].nbytes) // count for name in each}
            yield from _rows("layers", what, tokens, each, nbytes, {"layers": count})
    yield from _absent_rows("layers", names)


def small(names: Iterable[str], folder: Path, threads: int, rounds: int, work: Path) -> Iterator[Row]:
    """Milliseconds of one token of the small model, and of a prompt's token.

    Args:
        names: of ``SMALL``.
        folder: of the model, by ``real_weights.prepared``.
    """
    makings: dict[str, Making] = {}
    for name in names:
        if name.startswith(LLAMA):
            makings[name] = partial(_small_llama, name.removeprefix(LLAMA), folder, threads, work)
        else:
            makings[name] = partial(_small_ours, name, folder, work)
    with _made(makings) as models:
        for what, tokens, times in _measured(models, rounds):
            nbytes = {name: model.nbytes for name, model in models.items()}
            yield from _rows("small model", what, tokens, times, nbytes, {})
    yield from _absent_rows("small model", names)


@contextmanager
def _made(makings: Mapping[str, Making]) -> Iterator[dict[str, Model]]:
    """The models that can be made here, until the end."""
    models: dict[str, Model] = {}
    try:
        for name, make in makings.items():
            if not (name.startswith(LLAMA) and absent()):
                models[name] = make()
        yield models
    finally:
        for model in models.values():
            model.engine.close()
        models.clear()
        gc.collect()


def _measured(models: Mapping[str, Model], rounds: int) -> Iterator[tuple[str, int, dict[str, Times]]]:
    """("decode", 1, seconds of a token), then ("prompt", its tokens, seconds of all of them)."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(VOCABULARY, (PROMPT,), generator=generator).tolist()

    def decode(model: Model) -> list[float]:
        model.engine.read(prompt[:CONTEXT])
        return model.engine.write(WARM + STEPS)[WARM:]

    yield "decode", 1, in_turns(models, decode, rounds)
    yield "prompt", PROMPT, in_turns(models, lambda model: [model.engine.read(prompt)], rounds)


def _rows(
    part: str, what: str, tokens: int, times: Mapping[str, Times], nbytes: Mapping[str, int], more: Row
) -> Iterator[Row]:
    for name, found in times.items():
        faster = {
            peer: round(found.ratio(other), 3)
            for peer, other in times.items()
            if peer.startswith(LLAMA) and peer != name
        }
        row: Row = {"part": part, "what": what, "model": name, "tokens": tokens, **more, **found.to_json()}
        if what == "decode":
            row |= {"weight_bytes": nbytes[name], "gb_per_s": round(nbytes[name] / found.median / 1e9, 2)}
        if part == "small model":
            row["tokens_per_s"] = round(tokens / found.median, 1)
        yield row | {"times_faster_than": faster}


def _absent_rows(part: str, names: Iterable[str]) -> Iterator[Row]:
    for name in names:
        if name.startswith(LLAMA) and (reason := absent()):
            yield {"part": part, "model": name, "absent": reason}


def _config(count: int) -> Any:
    config = qwen3_6(count)
    config.vocab_size, config.layer_types = VOCABULARY, cpu_gguf.pattern(count, cpu_gguf.FIRST)
    return config


def _random_ours(name: str, config: Any) -> Model:
    return Model(Ours(packed(config, "cpu", **PLANS[name]), ROOM), token_bytes(config, **PLANS[name]))


def _random_llama(ftype: str, threads: int, work: Path, config: Any) -> Model:
    path = work / f"{ftype}-{config.num_hidden_layers}.gguf"
    nbytes = cpu_gguf.write(path, config, cpu_gguf.llama_types(config, ftype, work))
    return Model(LlamaCpp(path, ROOM, threads), nbytes)


def _small_ours(name: str, folder: Path, work: Path) -> Model:
    source = kappaquant.open_source(folder)
    output = work / name.replace(" ", "-")
    kappaquant.quantize(source, output, kappaquant.make_plan(source.tensors, source.config, **SMALL_PLANS[name]))
    model, _ = kappaquant.load(output, dtype=torch.bfloat16)  # the source here is float32, that of a user is not
    return Model(Ours(model, ROOM), held_bytes(model))


def _small_llama(ftype: str, folder: Path, threads: int, work: Path) -> Model:
    path = work / f"small-{ftype}.gguf"
    quantize_file(folder / FLOATS, path, ftype, {})
    engine = LlamaCpp(path, ROOM, threads)
    return Model(engine, engine.nbytes)
