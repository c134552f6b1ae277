"""The transformers configuration of a folder or of the content of its config.json, or why there is none, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kappaquant.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def of_folder(folder: str | Path) -> PretrainedConfig:
    """What transformers reads in a folder or repository. Raises UnsupportedError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as problem:  # a class's own checks raise what they like, code of the repository's own is not run
        raise UnsupportedError(
            f"{folder}: has no configuration that transformers can load by itself ({_said(problem)}); a newer transformers may know "
            "it, code that a model brings is not run"
        ) from None


def of_content(content: Mapping[str, Any]) -> PretrainedConfig:
    """What transformers makes of the content of a config.json. Raises UnsupportedError."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(content.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"config.json: model_type {model_type!r} is unknown to the installed transformers; a newer one may know it"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(_with_floats(dict(content)))
    except Exception as problem:
        raise UnsupportedError(
            f"config.json: transformers makes no {model_type} configuration of it ({_said(problem)}); correct it, or fetch it again"
        ) from None


def _with_floats(value: Any) -> Any:
    """A JSON value in which what JSON has no number for, {"__float__": "Infinity"} as transformers writes it, is a float again."""
    match value:
        case {"__float__": str(number), **rest} if not rest and number.lstrip("-") in ("Infinity", "NaN"):
            return float(number)
        case dict():
            return {key: _with_floats(each) for key, each in value.items()}
        case list():
            return [_with_floats(each) for each in value]
    return value


def _said(problem: Exception) -> str:
    """The message of an error in one line; of strict checks the second line is what was wrong."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return ": ".join(line.rstrip(":") for line in lines[:2]) if lines else type(problem).__name__
