"""mlx_lm's own HTTP server, with one codebook checkpoint behind it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.server import ModelProvider, run
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import maybe_set_recommended_wired_limit

from kappaquant.errors import UnsupportedError


class LoadedModel(ModelProvider):
    """Hands out one model that is loaded already, and never any other.

    mlx_lm's own provider would load, or download, whatever a request calls its model.
    """

    def __init__(self, options: Namespace, model: nn.Module, tokenizer: TokenizerWrapper) -> None:
        super().__init__(options)
        if self.is_distributed:
            raise UnsupportedError("quantized checkpoints run on one machine: start without mlx.launch")
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.model_key: Any = (options.model, None, None)
        self.is_batchable = all(hasattr(cache, "merge") for cache in make_prompt_cache(model))
        self.names = {"default_model", options.model, Path(options.model).name, str(Path(options.model).resolve())}

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[nn.Module, TokenizerWrapper]:
        """The model, if that is what a request asks for."""
        if model_path not in self.names:
            raise ValueError(f"model {model_path!r} is not served here; ask for {sorted(self.names)}")
        if adapter_path is not None or draft_model_path not in (None, "default_model"):
            raise ValueError("adapters and draft models are not served here")
        return self.model, self.tokenizer


def server_options(path: str, **changed: Any) -> Namespace:
    """What mlx_lm's server reads from its command line, at its own defaults.

    Raises:
        UnsupportedError: a changed option is none of them.
    """
    options: dict[str, Any] = {
        "model": path, "adapter_path": None, "draft_model": None, "num_draft_tokens": 3, "pipeline": False,
        "trust_remote_code": False, "allowed_origins": "*", "chat_template": "", "use_default_chat_template": False,
        "chat_template_args": {}, "temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 512,
        "decode_concurrency": 32, "prompt_concurrency": 8, "prefill_step_size": 2048, "prompt_cache_size": 10,
        "prompt_cache_bytes": None, "kv_bits": None, "kv_group_size": 64,
        "quantized_kv_start": DEFAULT_QUANTIZED_KV_START,
    }  # fmt: skip
    fixed = {"model", "adapter_path", "draft_model", "pipeline", "trust_remote_code"}
    unknown = changed.keys() - (options.keys() - fixed)
    if unknown:
        raise UnsupportedError(f"server options {sorted(unknown)}; known are {sorted(options.keys() - fixed)}")
    return Namespace(**options | changed)


def run_server(options: Namespace, model: nn.Module, tokenizer: TokenizerWrapper, host: str, port: int) -> None:
    """See ``kappaquant.engines.mlx.serve``."""
    if options.use_default_chat_template and tokenizer.chat_template is None:
        tokenizer.chat_template = tokenizer.default_chat_template
    maybe_set_recommended_wired_limit()
    run(host, port, LoadedModel(options, model, tokenizer))
