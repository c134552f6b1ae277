"""What reads and writes tokens on CPUs, timed by the call: kappaquant by its own decoder, llama.cpp by the library inside llama-cpp-python.

Both are asked the same: read a prompt from an empty cache, then write token after token, each the likeliest by the last logits.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from kappaquant.runtime.decoding import Decoder
from kappaquant.runtime.sampling import Sampler, Sampling

_WARNING, _ERROR = 3, 4  # of ggml's levels


class Engine(Protocol):
    """A model in memory, ready to be timed until it is closed."""

    def read(self, prompt: Sequence[int]) -> float:
        """Forget what was before and read a prompt; seconds until the token after it is known."""
        ...

    def write(self, tokens: int) -> list[float]:
        """Write so many tokens after what was read; seconds of each."""
        ...

    def close(self) -> None:
        """Free its memory."""
        ...


class Ours:
    """A model of transformers whose weights are kappaquant's."""

    def __init__(self, model: Any, room: int) -> None:
        self._decoder = Decoder(model, 1, room)
        self._sampler = Sampler(Sampling(), torch.device("cpu"))
        self._next = torch.zeros(1, dtype=torch.int64)

    def read(self, prompt: Sequence[int]) -> float:
        begin = time.perf_counter()
        self._next = self._sampler(self._decoder.prefill(torch.tensor([prompt])))
        return time.perf_counter() - begin

    def write(self, tokens: int) -> list[float]:
        took = []
        for _ in range(tokens):
            begin = time.perf_counter()
            self._next = self._sampler(self._decoder.step(self._next))
            took.append(time.perf_counter() - begin)
        return took

    def close(self) -> None:
        del self._decoder


class LlamaCpp:
    """A GGUF file in llama.cpp, with its defaults but for the number of threads.

    Raises:
        SystemExit: llama.cpp could not load the file or decode; what it last said is in the message.
    """

    def __init__(self, path: Path, room: int, threads: int) -> None:
        import llama_cpp

        self._said: list[str] = []
        # kept as long as the library may call it
        self._log = llama_cpp.llama_log_callback(self._hear)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._library, self._path = llama_cpp, path
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise SystemExit(f"{path}: llama.cpp could not load it: {self._last_words()}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = room
        params.n_threads = params.n_threads_batch = threads
        context = llama_cpp.llama_init_from_model(model, params)
        if not context:
            raise SystemExit(f"{path}: llama.cpp could not make a context for it: {self._last_words()}")
        self._model, self._context = model, context
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._next = 0

    def read(self, prompt: Sequence[int]) -> float:
        llama = self._library
        begin = time.perf_counter()
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        self._next = self._after(prompt)
        return time.perf_counter() - begin

    def write(self, tokens: int) -> list[float]:
        took = []
        for _ in range(tokens):
            begin = time.perf_counter()
            self._next = self._after([self._next])
            took.append(time.perf_counter() - begin)
        return took

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        size: int = self._library.llama_model_size(self._model)
        return size

    def close(self) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def _after(self, tokens: Sequence[int]) -> int:
        llama = self._library
        held = (llama.llama_token * len(tokens))(*tokens)
        code = llama.llama_decode(self._context, llama.llama_batch_get_one(held, len(tokens)))
        if code:
            raise SystemExit(f"{self._path}: llama.cpp could not decode (code {code}): {self._last_words()}")
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(self._context, -1), (self._vocabulary,))
        return int(logits.argmax())

    def _hear(self, level: int, text: bytes, data: Any) -> None:
        if level in (_WARNING, _ERROR):
            self._said.append(text.decode(errors="replace"))

    def _last_words(self) -> str:
        return " ".join("".join(self._said).splitlines()[-3:])


def take(folder: Path) -> None:
    """Let ``import llama_cpp`` mean the package in this folder; what it needs besides is taken from there if it is nowhere else.

    Raises:
        SystemExit: there is none.
    """
    path = folder / "llama_cpp" / "__init__.py"
    if not path.is_file():
        raise SystemExit(
            f"{folder}: has no package llama_cpp; fill it by pip install --target {folder} llama-cpp-python"
        )
    sys.path.append(str(folder))
    spec = spec_from_file_location("llama_cpp", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["llama_cpp"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)


def about() -> dict[str, Any]:
    """Version, and the instruction sets that the library was compiled for, in its own words."""
    import llama_cpp

    return {
        "llama-cpp-python": llama_cpp.__version__,
        "compiled_for": llama_cpp.llama_print_system_info().decode().strip(" |"),
    }
