"""Calibration text: a file of text or of messages, as windows of tokens of the model that is quantized."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kappaquant.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

WINDOW = 1024  # tokens that a model reads at once
TOKENS = 128 * WINDOW


@dataclass(frozen=True)
class Calibration:
    """What layers read while their weights are rounded.

    Attributes:
        windows: int64 [windows, tokens].
        record: what a manifest says of it: the file's name, a hash of the tokens, how many there are.
    """

    windows: Tensor
    record: dict[str, Any]


def calibration(
    path: Path, tokenizer: PreTrainedTokenizerBase, tokens: int = TOKENS, window: int = WINDOW
) -> Calibration:
    """The first ``tokens`` of a file, in windows one after another; what does not fill the last one is left out.

    A text shorter than a window is one window of its own length.

    Args:
        path: .txt, or .jsonl with a ``text`` or ``messages`` (through the chat template) on each line.

    Raises:
        PlanError: no such file, a line of another kind, or text of fewer than two tokens.
    """
    import torch

    if tokens < 2:
        raise PlanError(f"--calibration-tokens {tokens}: must be 2 or more")
    ids: list[int] = []
    for text in _texts(path, tokenizer):
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= tokens:
            break
    ids = ids[:tokens]
    if len(set(ids)) < 2:
        raise PlanError(
            f"{path}: gives {len(ids)} tokens, {len(set(ids))} of them different; calibration needs text that a model of "
            "this kind reads, best some 128 thousand tokens of it"
        )
    window = min(window, len(ids))
    windows = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    return Calibration(
        windows, {"file": path.name, "tokens": windows.numel(), "window": window, "tokens_sha256": digest}
    )


def _texts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if not path.is_file():
        raise PlanError(f"{path}: no such file; --calibration takes a .txt or .jsonl")
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise PlanError(f"{path}: cannot be read as UTF-8 text, which --calibration takes: {problem}") from None
    if path.suffix != ".jsonl":
        return [content]
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        match row:
            case {"text": str(text)}:
                texts.append(text)
            case {"messages": [*messages]}:
                made = tokenizer.apply_chat_template(messages, tokenize=False)
                texts.append(str(made))
            case _:
                raise PlanError(f'{path}:{number}: must be a JSON object with a "text" or "messages"')
    return texts
