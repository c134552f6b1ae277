"""A quantized model at work: generate, chat."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kappaquant.commands.options import ActivationsOpt, CheckpointArg, DeviceOpt, refuse_unused
from kappaquant.commands.terminal import console, emit

TemperatureOpt = Annotated[float, typer.Option(help="0 takes the most likely token.")]
TopPOpt = Annotated[float, typer.Option(help="Draw from the likeliest tokens that together have this probability.")]
TopKOpt = Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0 for all.")]
MinPOpt = Annotated[float, typer.Option(help="Draw from tokens of at least this share of the likeliest one's.")]
SeedOpt = Annotated[int | None, typer.Option(help="Makes draws repeatable.")]
StopOpt = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")]
MaxTokensOpt = Annotated[int, typer.Option(help="Tokens to generate at most.")]


def generate(
    checkpoint: CheckpointArg,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: MaxTokensOpt = 256,
    temperature: TemperatureOpt = 0.0,
    top_p: TopPOpt = 1.0,
    top_k: TopKOpt = 0,
    min_p: MinPOpt = 0.0,
    seed: SeedOpt = None,
    stop: StopOpt = None,
    device: DeviceOpt = None,
    activations: ActivationsOpt = "int8",
) -> None:
    """Continue a prompt, token by token as they come."""
    from kappaquant.runtime.generate import stream

    _check_drawing(temperature, top_p, top_k, min_p, seed)
    model, tokenizer = load_quantized(checkpoint, device, activations)
    emit(
        stream(
            model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
            min_p=min_p, seed=seed, stop=stop or (),
        )
    )  # fmt: skip


def chat(
    checkpoint: CheckpointArg,
    max_new_tokens: MaxTokensOpt = 512,
    temperature: TemperatureOpt = 0.0,
    top_p: TopPOpt = 1.0,
    top_k: TopKOpt = 0,
    min_p: MinPOpt = 0.0,
    seed: SeedOpt = None,
    stop: StopOpt = None,
    device: DeviceOpt = None,
    activations: ActivationsOpt = "int8",
) -> None:
    """Talk to the model; an empty line or end of input leaves."""
    from kappaquant.runtime.generate import chat as reply

    _check_drawing(temperature, top_p, top_k, min_p, seed)
    model, tokenizer = load_quantized(checkpoint, device, activations)
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = console().input("[bold]you:[/] ").strip()
        except EOFError:
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        pieces = reply(
            model, tokenizer, messages, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
            min_p=min_p, seed=seed, stop=stop or (),
        )  # fmt: skip
        messages.append({"role": "assistant", "content": emit(pieces)})


def _check_drawing(temperature: float, top_p: float, top_k: int, min_p: float, seed: int | None) -> None:
    """Meet bad options before a model is loaded."""
    from kappaquant.runtime.sampling import Sampling

    Sampling(temperature, top_p, top_k, min_p, seed)
    if temperature == 0:
        given = {
            "--top-p": None if top_p == 1 else top_p,
            "--top-k": top_k or None,
            "--min-p": min_p or None,
            "--seed": seed,
        }
        refuse_unused(given, "at temperature 0, where nothing is drawn; give --temperature too")


def load_quantized(checkpoint: str, device: str | None, activations: str) -> tuple[Any, Any]:
    from transformers.utils import logging as transformers_logging

    from kappaquant.engines.transformers.load import load
    from kappaquant.files.processes import choose_device

    transformers_logging.set_verbosity_error()  # hints at faster kernels would stand in the middle of the answer
    return load(checkpoint, device=choose_device(device), activations=activations)
