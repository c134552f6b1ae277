"""The original as a transformers model, where it fits into memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kappaquant.engines.transformers.load import TOKENIZER_FILES
from kappaquant.errors import SourceError, UnsupportedError
from kappaquant.models.plain import plain_model
from kappaquant.models.tokenizer import read_tokenizer
from kappaquant.sources.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CGROUP = Path("/sys/fs/cgroup")


def load_original(source: Source, device: str) -> PreTrainedModel:
    """A source as a model in evaluation mode: bfloat16 on a GPU, float32 on a CPU, which computes so faster as a rule.

    Raises:
        UnsupportedError: its weights are larger than the free memory, or it is streamed and never there as a whole.
    """
    folder = whole_folder(source)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    needed, free = sum(info.numel for info in source.tensors.values()) * dtype.itemsize, free_memory(device)
    if needed > free:
        raise UnsupportedError(
            f"{source.label}: takes {needed / 1e9:.1f} GB as {str(dtype).removeprefix('torch.')}, {device} has {free / 1e9:.1f} GB free: "
            "it cannot write its calibration text here; give --calibration FILE, or quantize it with --effort best and let that "
            "checkpoint write one: kappaquant write CHECKPOINT -o text.jsonl"
        )
    return plain_model(folder, dtype, device)


def whole_folder(source: Source) -> Path:
    """Where all of a source lies. Raises UnsupportedError for a streamed one."""
    if source.folder is None:
        raise UnsupportedError(
            f"{source.label}: a streamed model is never there as a whole, so it cannot write its calibration text; leave out "
            "--stream, or give --calibration FILE"
        )
    return source.folder


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a source, fetched from the Hub where that is streamed. Raises SourceError."""
    if not set(TOKENIZER_FILES) & set(source.side_files):  # transformers would make up an empty one
        raise SourceError(
            f"{source.label}: has no tokenizer ({', '.join(TOKENIZER_FILES)}), which calibration needs; fetch the model again"
        )
    return read_tokenizer(source.folder or source.label, source.revision)


def free_memory(device: str) -> int:
    """Bytes that a model may take on a device; on the CPU what Linux says is available, less where a control group bounds it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    page = os.sysconf("SC_PAGE_SIZE")
    bounds = [os.sysconf("SC_PHYS_PAGES") * page]  # the whole memory, where nothing says more
    if (memory := Path("/proc/meminfo")).is_file():
        fields = dict(line.split(":", 1) for line in memory.read_text().splitlines())
        bounds.append(int(fields["MemAvailable"].split()[0]) * 1024)
    limit = _CGROUP / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        held = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        bounds.append(int(text) - int(held["anon"]))  # files that are cached give way
    return max(0, min(bounds))
