"""llama.cpp's quantization of the real model, by the library inside llama-cpp-python; read back by the gguf package.

Its K and I types hold blocks of 256 weights of one row. SmolLM2's rows of 576 are no multiple of that, so llama.cpp itself takes
larger types for most matrices and says so; ``file_variants`` are that, what a user gets. ``type_variants`` show what the types do at
their own bits: the blocks run on from one row into the next.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.real_measure import Bench, Packed, Variant, mean_squares
from benchmarks.real_weights import FLOATS, gguf_names, read_gguf

# name -> whether with an importance matrix
FILES = (
    ("Q2_K", False), ("Q3_K_M", False), ("Q4_K_M", False), ("Q5_K_M", False), ("Q6_K", False),
    ("IQ3_XXS", True), ("Q3_K_M", True), ("IQ4_XS", True), ("Q4_K_M", True),
)  # fmt: skip
# IQ2 types are left out: their search takes an hour on two cores
TYPES = (
    ("Q2_K", False), ("Q3_K", False), ("Q4_K", False), ("Q5_K", False), ("Q6_K", False),
    ("IQ3_XXS", True), ("Q3_K", True), ("IQ4_XS", True), ("Q4_K", True), ("Q5_K", True),
)  # fmt: skip


def absent(bench: Bench | None = None) -> str | None:
    """Why llama.cpp cannot be asked; None if it can."""
    missing = [name for name, module in (("llama-cpp-python", "llama_cpp"), ("gguf", "gguf")) if not find_spec(module)]
    return f"{' and '.join(missing)} not installed" if missing else None


def variants() -> list[Variant]:
    """Whole files as llama.cpp makes them, then its types alone."""
    found = []
    for name, weighted in FILES:
        setting = f"llama_model_quantize, {name}{', importance matrix' if weighted else ''}"
        title = f"llama.cpp {name}{' imatrix' if weighted else ''}"
        found.append(Variant(title, "llama.cpp", setting, partial(whole_file, name, weighted), weighted, absent=absent))
    for name, weighted in TYPES:
        setting = f"ggml_quantize_chunk, {name}, blocks across rows{', importance matrix' if weighted else ''}"
        title = f"type {name}{' imatrix' if weighted else ''}"
        found.append(
            Variant(title, "llama.cpp type", setting, partial(one_type, name, weighted), weighted, absent=absent)
        )
    return found


def sizes() -> list[str]:
    """Of the whole files one row for each size: an importance matrix changes no bytes."""
    first: dict[str, str] = {}
    for variant, (name, _) in zip(variants(), FILES, strict=False):
        first.setdefault(name, variant.name)
    return list(first.values())


def importance(bench: Bench) -> Mapping[str, Tensor]:
    """The importance matrix, computed once and kept in the work folder."""
    from safetensors.torch import load_file, save_file

    path = bench.work / "importance.safetensors"
    if not path.exists():
        save_file(mean_squares(bench), path)
    return load_file(path)


def whole_file(name: str, weighted: bool, bench: Bench) -> Packed:
    """A file of llama.cpp, embedding and norms included, as tensors of the original's names."""
    layers, heads = bench.source.config["num_hidden_layers"], bench.source.config["num_attention_heads"]
    names = gguf_names([*bench.infos], layers)
    target = bench.work / f"{name}.gguf"
    quantize_file(bench.folder / FLOATS, target, name, _by_gguf_name(names, importance(bench)) if weighted else {})
    of = {"attn_q": heads, "attn_k": bench.source.config["num_key_value_heads"]}
    read = read_gguf(target, names, of)
    target.unlink()
    return {tensor: (torch.from_numpy(values), nbytes) for tensor, (values, nbytes, _) in read.items()}


def _by_gguf_name(names: Mapping[str, str], weights: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {other: weights[name].numpy() for other, name in names.items() if name in weights}


def quantize_file(source: Path, target: Path, ftype: str, weights: Mapping[str, np.ndarray]) -> None:
    """What llama-quantize does, with ``weights`` as its importance matrix where there are any."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}"), torch.get_num_threads()
    kept = {name: np.ascontiguousarray(values, np.float32) for name, values in weights.items()}
    if kept:
        entry = llama_cpp.llama_model_imatrix_data
        table = (entry * (len(kept) + 1))()  # ends with an entry without a name
        for place, (name, values) in enumerate(kept.items()):
            pointer = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            table[place] = entry(name.encode(), pointer, len(values))
        params.imatrix = table
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if code:
        raise SystemExit(f"{source}: llama.cpp could not quantize it as {ftype} (code {code})")


def one_type(name: str, weighted: bool, bench: Bench) -> Packed:
    """Every matrix in one type, four rows of 576 as nine blocks of 256."""
    squares = importance(bench) if weighted else {}

    def packed(matrix: str, weight: Tensor) -> tuple[Tensor, int]:
        values, nbytes = across_rows(weight.numpy(), name, squares[matrix].numpy() if weighted else None)
        return torch.from_numpy(values), nbytes

    weights = bench.weights()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # llama.cpp's own code runs without Python's lock
        return dict(zip(weights, pool.map(packed, weights.keys(), weights.values()), strict=True))


def across_rows(weight: np.ndarray, name: str, squares: np.ndarray | None) -> tuple[np.ndarray, int]:
    """(dequantized, bytes) of a matrix whose blocks run on across rows.

    The block at a place sees the same columns again every lcm(columns, 256) weights; blocks of one such phase go to llama.cpp
    together, as rows of 256 columns that share their importance.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[name]
    size, block_bytes = GGML_QUANT_SIZES[kind]
    if weight.size % size:
        raise ValueError(f"{list(weight.shape)}: no multiple of {size} weights")
    blocks, phases = weight.reshape(-1, size), np.lcm(weight.shape[1], size) // size
    importance_of = None if squares is None else np.tile(squares, phases * size // len(squares)).reshape(phases, size)
    made = np.empty_like(blocks)
    for phase in range(phases):
        rows = np.ascontiguousarray(blocks[phase::phases], np.float32)
        if len(rows):
            raw = encoded_rows(rows, kind, None if importance_of is None else importance_of[phase])
            made[phase::phases] = dequantize(raw, kind)
    return made.reshape(weight.shape), blocks.shape[0] * block_bytes


def encoded_rows(rows: np.ndarray, kind: Any, importance_of: np.ndarray | None = None) -> np.ndarray:
    """Rows [n, columns], float32, in a GGUF type: uint8 [n, bytes].

    Args:
        importance_of: of the columns, float32.
    """
    from gguf import GGML_QUANT_SIZES

    size, block_bytes = GGML_QUANT_SIZES[kind]
    floats = ctypes.POINTER(ctypes.c_float)
    raw = np.empty((rows.shape[0], rows.shape[1] // size * block_bytes), np.uint8)
    weights = None if importance_of is None else np.ascontiguousarray(importance_of, np.float32)
    pointer = floats() if weights is None else weights.ctypes.data_as(floats)
    quantize = _library().ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    long = ctypes.c_int64
    written = quantize(
        ctypes.c_int(int(kind)), rows.ctypes.data_as(floats), raw.ctypes.data_as(ctypes.c_void_p), long(0),
        long(rows.shape[0]), long(rows.shape[1]), pointer,
    )  # fmt: skip
    if written != raw.nbytes:
        raise ValueError(f"llama.cpp wrote {written} bytes, expected {raw.nbytes}")
    return raw


def _library() -> Any:
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    (library,) = [*folder.glob("libggml-base.so"), *folder.glob("libggml-base.dylib")]
    return ctypes.CDLL(str(library))
