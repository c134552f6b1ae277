"""Quantized checkpoints in mlx_lm: ``load``, and ``serve`` through mlx_lm's own server. Nothing here imports torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kappaquant.errors import UnsupportedError

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

logger = logging.getLogger("kappaquant")

__all__ = ["load", "serve"]


def load(
    path: str | Path, dtype: mx.Dtype | None = None, tokenizer_config: dict[str, Any] | None = None
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a quantized checkpoint folder, kappaquant v1 or tq3_native, as an mlx_lm model with packed weights.

    The model is one of mlx_lm's own, for ``mlx_lm.generate`` and all else that takes one; of a multimodal checkpoint it is
    the language model.

    Args:
        dtype: of activations and kept tensors; default the one in config.json.
        tokenizer_config: what mlx_lm's ``load_tokenizer`` passes on to transformers.

    Returns:
        The model, and mlx_lm's tokenizer.

    Raises:
        FormatError: a tensor is missing, extra or misshapen, or the checkpoint is malformed.
        UnsupportedError: MLX is not installed, the architecture is not one tried with mlx_lm, or a packed tensor has no
            packed module.
    """
    _require_mlx_lm()
    from mlx_lm.utils import load_config, load_tokenizer

    from kappaquant.engines.mlx.loading import Loader
    from kappaquant.engines.mlx.skeleton import open_folder

    checkpoint, skeleton = open_folder(path)
    for notice in checkpoint.notices:
        logger.warning("%s: %s", checkpoint.path, notice)
    model = Loader(checkpoint, skeleton, dtype).load()
    eos = load_config(checkpoint.path).get("eos_token_id")
    return model, load_tokenizer(checkpoint.path, tokenizer_config, eos_token_ids=eos)


def serve(
    path: str | Path,
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    dtype: mx.Dtype | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Load a quantized checkpoint and answer OpenAI's HTTP API with mlx_lm's own server, until interrupted.

    The server knows this one model, under "default_model", its path or its folder's name; a request for another fails.

    Args:
        dtype, tokenizer_config: as for ``load``.
        options: of ``mlx_lm.server``'s command line, such as ``max_tokens`` or ``temp``.

    Raises:
        FormatError, UnsupportedError: as for ``load``, before anything listens; or an option is unknown.
        OSError: the address cannot be listened at.
    """
    _require_mlx_lm()
    from kappaquant.engines.mlx.server import run_server, server_options

    arguments = server_options(str(path), **options)
    model, tokenizer = load(path, dtype, tokenizer_config)
    run_server(arguments, model, tokenizer, host, port)


def _require_mlx_lm() -> None:
    try:
        import mlx_lm  # noqa: F401
    except ImportError as problem:
        raise UnsupportedError(f"MLX: {problem}; pip install 'kappaquant[mlx]'") from problem
