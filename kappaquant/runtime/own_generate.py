"""One token at a time from a model that no decoder of ours knows: its own ``generate`` runs, and waits for each token.

transformers keeps whatever cache such a model has, under whatever name, and prepares its inputs. Its loop calls us for the scores of
every step, in a thread of its own, and is held there until the next token is given, or nobody wants one any more.
"""

from __future__ import annotations

import copy
import queue
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kappaquant.errors import UnsupportedError
from kappaquant.runtime.prompts import check_prompt, check_room, check_step, device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OwnGenerate:
    """What ``Decoder`` does, by ``model.generate``: slower, and right for every model that can generate.

    Args, and what is raised: as for ``Decoder``.
    """

    graphed = False
    kernels_per_step = None

    def __init__(self, model: PreTrainedModel, batch: int, max_length: int) -> None:
        if not model.can_generate():
            raise UnsupportedError(
                f"{type(model).__name__}: has no head that predicts tokens, so it cannot generate text; load it as "
                "AutoModelForCausalLM does"
            )
        check_room(batch, max_length)
        self.model, self.batch, self.max_length = model, batch, max_length
        self.device = device_of(model)
        self.length = 0
        self._loop: _Loop | None = None
        self._ended: Any = None

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """As ``Decoder.prefill``."""
        input_ids = input_ids.to(self.device)
        check_prompt(input_ids, attention_mask, self.batch, self.max_length)
        self.close()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(self.device)
        self._loop = _Loop(self.model, input_ids, mask, self.max_length - input_ids.shape[1])
        self._ended = weakref.finalize(self, self._loop.stop)  # who forgets this object leaves no thread behind
        self.length = input_ids.shape[1]
        return self._loop.scores()

    def step(self, tokens: Tensor) -> Tensor:
        """As ``Decoder.step``."""
        check_step(self.length, self.max_length)
        assert self._loop is not None
        self.length += 1
        return self._loop.scores(tokens)

    def close(self) -> None:
        """End the loop of the last prompt, and let go of its cache."""
        if self._ended is not None:
            self._ended()
        self._loop = self._ended = None
        self.length = 0


class _StoppedError(Exception):
    """Unwinds ``generate`` where nobody wants its next token."""


class _Loop:
    """A call of ``generate`` that is under way, in a thread."""

    def __init__(self, model: Any, input_ids: Tensor, attention_mask: Tensor, most: int) -> None:
        from transformers import GenerationConfig, LogitsProcessorList

        plain = copy.copy(
            model
        )  # the same modules; what its generation config adds to scores is none of a sampler's business
        plain.generation_config = GenerationConfig(pad_token_id=0)
        self._found: queue.SimpleQueue[Tensor | BaseException] = queue.SimpleQueue()
        self._wanted: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()

        def run() -> None:
            try:
                plain.generate(
                    input_ids, attention_mask=attention_mask, do_sample=False, max_new_tokens=most + 1,
                    logits_processor=LogitsProcessorList([self._hold]),
                )  # fmt: skip
            except _StoppedError:
                pass
            except BaseException as problem:  # it belongs to who asked for the scores
                self._found.put(problem)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def scores(self, tokens: Tensor | None = None) -> Tensor:
        """Logits [B, V] of the next token, after these tokens if any; what the model raises is raised here."""
        if tokens is not None:
            self._wanted.put(tokens)
        found = self._found.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def stop(self) -> None:
        self._wanted.put(None)
        self._thread.join()

    def _hold(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A processor of scores: hands them out, and lets only the token that comes back for each row be the likeliest."""
        self._found.put(scores)
        tokens = self._wanted.get()
        if tokens is None:
            raise _StoppedError
        return torch.full_like(scores, float("-inf")).scatter(1, tokens.view(-1, 1).to(scores.device), 0.0)
