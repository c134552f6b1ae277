"""The tokenizer of a folder or repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kappaquant.errors import SourceError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_tokenizer(location: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """What transformers makes of tokenizer files; code that a repository brings is not run, and nobody is asked whether to.

    Raises:
        SourceError: it can make nothing of them; says what it said.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=False)
    except Exception as problem:  # of broken files the tokenizers library raises no narrower one
        said = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise SourceError(
            f"{location}: has no tokenizer that transformers can load by itself ({said}); fetch its files again, or give a model whose "
            "tokenizer needs no code of its own"
        ) from None


def templated(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """What the chat template makes of messages; ``options`` as for transformers' ``apply_chat_template``.

    Raises:
        UnsupportedError: the template is broken, or does not take these messages; says what it said.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template([dict(message) for message in messages], **options)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as problem:  # whatever its code does
        said = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise UnsupportedError(
            f"{tokenizer.name_or_path}: its chat template makes nothing of this conversation ({said}); fetch chat_template.jinja again, "
            "or begin and alternate as the model expects"
        ) from None
