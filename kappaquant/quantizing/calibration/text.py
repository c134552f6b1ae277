"""Calibration text: a file of text or of messages, as windows of tokens of the model that is quantized."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kappaquant.errors import PlanError
from kappaquant.models.tokenizer import templated
from kappaquant.quantizing.calibration.written import Header, read_header

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
        record: what a manifest says of it: the file's name, a hash of the tokens, how many there are; which model wrote it, if one did.
    """

    windows: Tensor
    record: dict[str, Any]


def calibration(
    path: Path, tokenizer: PreTrainedTokenizerBase, tokens: int = TOKENS, window: int = WINDOW
) -> Calibration:
    """The first ``tokens`` of a file, in windows one after another; what does not fill the last one is left out.

    A text shorter than a window is one window of its own length. Which model wrote a text is told by its first line, if one did;
    ``quantize`` refuses that of another.

    Args:
        path: .txt, or .jsonl with a ``text`` or ``messages`` (through the chat template) on each line.

    Raises:
        PlanError: no such file, a line of another kind, or text of fewer than two tokens.
    """
    check_tokens(tokens)
    texts, header = read(path, tokenizer)
    return _windows(texts, tokenizer, tokens, window, str(path), {"file": path.name}, header)


def calibration_of_texts(
    texts: Iterable[str], header: Header, tokenizer: PreTrainedTokenizerBase, tokens: int = TOKENS, window: int = WINDOW
) -> Calibration:
    """As ``calibration``, of texts that a model wrote (``kappaquant.runtime.writing``) and no file's name stands for."""
    check_tokens(tokens)
    return _windows(texts, tokenizer, tokens, window, header.written_by.model, {}, header)


def check_tokens(tokens: int, option: str = "--calibration-tokens") -> None:
    """Raise PlanError for fewer tokens than can calibrate."""
    if tokens < 2:
        raise PlanError(f"{option} {tokens}: must be 2 or more")


def check_there(path: Path) -> None:
    """Raise PlanError where there is no such file."""
    if not path.is_file():
        raise PlanError(f"{path}: no such file; --calibration takes a .txt or .jsonl")


def _windows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, tokens: int, window: int, label: str, named: dict[str, str],
    header: Header | None,
) -> Calibration:  # fmt: skip
    import torch

    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= tokens:
            break
    ids = ids[:tokens]
    if len(set(ids)) < 2:
        raise PlanError(
            f"{label}: gives {len(ids)} tokens, {len(set(ids))} of them different; calibration needs text that a model of "
            "this kind reads, best some 128 thousand tokens of it"
        )
    window = min(window, len(ids))
    windows = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    record = {**named, "tokens": windows.numel(), "window": window, "tokens_sha256": digest}
    return Calibration(windows, record | (header.record if header else {}))


def read(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], Header | None]:
    """The texts of a file, and its header if a model wrote them. Raises PlanError."""
    check_there(path)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise PlanError(f"{path}: cannot be read as UTF-8 text, which --calibration takes: {problem}") from None
    if path.suffix != ".jsonl":
        return [content], None
    texts = []
    lines = content.split("\n")  # splitlines would cut at characters that JSON strings may hold
    header = read_header(lines[0], str(path))
    for number, line in enumerate(lines, 1):
        if not line.strip() or (header and number == 1):
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        match row:
            case {"text": str(text)}:
                texts.append(text)
            case {"messages": [*messages]}:
                made = templated(tokenizer, messages, tokenize=False)
                texts.append(str(made))
            case _:
                raise PlanError(f'{path}:{number}: must be a JSON object with a "text" or "messages"')
    return texts, header
