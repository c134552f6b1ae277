"""Text that a loaded model writes for its own calibration: seeds continued in batches, until there are tokens enough."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kappaquant.errors import UnsupportedError
from kappaquant.models.tokenizer import templated
from kappaquant.quantizing.calibration.text import check_tokens
from kappaquant.quantizing.calibration.written import TOKENS, Rules, seeds
from kappaquant.runtime.decoding import borrowed
from kappaquant.runtime.generate import UNFINISHED, tokens
from kappaquant.runtime.prompts import device_of
from kappaquant.runtime.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_Prompt = tuple[str, list[int]]


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: int = TOKENS,
    rules: Rules | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[str]:
    """Texts that begin with the seeds and go on as the model samples, to an end token (included) or the rules' length.

    The same machine and libraries give the same texts. A tokenizer without a chat template gets the first question of a dialogue as
    plain text; seeds in characters that it has no tokens for are left out, and so is what the model ends at once. When all
    seeds were taken, they are taken again, and go on differently.

    Args:
        wanted: tokens that the texts must have together, as the tokenizer reads them; the last batch may give more.
        rules: of sampling; default those of ``Header``.
        progress: called with "write", the tokens so far and those wanted.

    Raises:
        PlanError: fewer than two tokens are wanted.
        UnsupportedError: no seed fits the tokenizer, or the model ends every text at once.
    """
    check_tokens(wanted)
    rules = rules or Rules()
    ends = _ends(model, tokenizer)
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 20
    prompts = [
        prompt for prompt in map(_prompt_of(tokenizer, ends), seeds()) if prompt and 2 * len(prompt[1]) <= longest
    ]
    if not prompts:
        raise UnsupportedError(
            f"{tokenizer.name_or_path}: its tokenizer has no tokens for any seed of calibration text; give --calibration FILE"
        )
    most = max(len(ids) for _, ids in prompts)
    length = min(rules.length, longest - most)
    rows = rules.rows  # however few tokens are wanted, so that a shorter text is the beginning of a longer one
    order = _again_and_again(prompts)
    found: list[str] = []
    done, empty = 0, 0
    progress("write", 0, wanted)
    with borrowed(model, rows, most + length) as decoder:
        sampler = Sampler(Sampling(temperature=rules.temperature, seed=rules.seed), device_of(model))
        while done < wanted:
            batch = [next(order) for _ in range(rows)]
            ids, mask = _padded([ids for _, ids in batch])
            columns = []
            for column in tokens(decoder, ids, mask, sampler, length, ends):
                columns.append(column)
                progress("write", min(done + len(columns) * rows, wanted), wanted)
            for (text, start), drawn in zip(batch, zip(*columns, strict=True), strict=True):
                more = _continuation(tokenizer, start, drawn, ends)
                empty = 0 if more else empty + 1
                if more:
                    found.append(text + more)
                    done += len(tokenizer(found[-1])["input_ids"])
            if empty >= len(prompts):
                raise UnsupportedError(
                    f"{tokenizer.name_or_path}: the model ends each of {len(prompts)} texts at once, so that it cannot write its own "
                    "calibration text; give --calibration FILE"
                )
            progress("write", min(done, wanted), wanted)
    return found


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens behind which nothing belongs to a text."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    found = {ends} if isinstance(ends, int) else set(ends or ())
    return found | ({tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set())


def _prompt_of(
    tokenizer: PreTrainedTokenizerBase, ends: Collection[int]
) -> Callable[[Mapping[str, Any]], _Prompt | None]:
    """From a seed to the text that a file will begin with, and the tokens that the model reads; None where it has none."""
    itself: list[int] = tokenizer("")["input_ids"]  # what the tokenizer puts around any text
    bos = tokenizer.bos_token if tokenizer.bos_token_id in itself else None

    def prompt(seed: Mapping[str, Any]) -> _Prompt | None:
        if "messages" in seed and tokenizer.chat_template:
            text = str(templated(tokenizer, seed["messages"], tokenize=False, add_generation_prompt=True))
            text = text.removeprefix(bos or "")  # else it would be there twice when the file is read
        else:
            text = seed["text"] if "text" in seed else seed["messages"][-1]["content"]
        ids: list[int] = tokenizer(text)["input_ids"]
        while ids and ids[-1] in ends:
            ids = ids[:-1]
        unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids
        return None if unknown or not ids else (text, ids)

    return prompt


def _again_and_again(prompts: Sequence[_Prompt]) -> Iterator[_Prompt]:
    """All prompts, mixed, then all of them in another order, without end; no library's generator decides which."""
    number = 0
    while True:
        yield from sorted(prompts, key=lambda p: hashlib.sha256(json.dumps([number, p[0]]).encode()).digest())
        number += 1


def _padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask, int64 [B, T], padded on the left with a token that is there."""
    most = max(map(len, rows))
    ids = torch.tensor([[row[0]] * (most - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (most - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _continuation(
    tokenizer: PreTrainedTokenizerBase, start: list[int], drawn: Sequence[int], ends: Collection[int]
) -> str:
    """What was drawn, as text, with its end token; "" where nothing stands before that."""
    stop = next((at for at, token in enumerate(drawn) if token in ends), None)
    own = list(drawn[:stop])
    if not own:
        return ""
    if stop is not None:
        own.append(drawn[stop])
    # some tokenizers drop a space at the beginning of what they decode
    before, whole = (str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in (start, [*start, *own]))
    before = before.rstrip(UNFINISHED)
    return whole[len(before) :].rstrip(UNFINISHED)
