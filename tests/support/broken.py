"""Ways to break a model, a checkpoint, and what is read beside them."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
Break = Callable[[Path], None]


def wrote(name: str, content: str | bytes) -> Break:
    return lambda folder: (
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content) and None
    )


def without(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def set_in(name: str, *path: str, to: Any) -> Break:
    """A value of a JSON file replaced, or taken out where ``to`` is ``...``."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        place = content
        for key in path[:-1]:
            place = place[key]
        if to is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = to
        (folder / name).write_text(json.dumps(content))

    return change


def cut(name: str, keep: float) -> Break:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(keep * len(data))])

    return change


def header(text: bytes, length: int | None = None) -> Break:
    return wrote(WEIGHTS, struct.pack("<Q", len(text) if length is None else length) + text)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Break:
    def apply(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, {"format": "pt"})

    return apply


def instead(name: str, make: Callable[[Path], Any]) -> Break:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


def a_pipe(folder: Path) -> None:
    shutil.rmtree(folder)
    os.mkfifo(folder)


def pickles(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def an_adapter(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_config.json").write_text("{}")


def index(weight_map: Any) -> Break:
    return wrote(INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}))


Q = "model.layers.0.self_attn.q_proj.weight"
BOTH: dict[str, Break] = {
    "no folder": shutil.rmtree,
    "empty folder": empty,
    "a file instead of a folder": a_file,
    "a pipe instead of a folder": a_pipe,
    "no config.json": without(CONFIG),
    "config.json is empty": wrote(CONFIG, ""),
    "config.json is no JSON": wrote(CONFIG, "{model_type: llama}"),
    "config.json is a list": wrote(CONFIG, "[1, 2]"),
    "config.json is binary": wrote(CONFIG, b"\xff\xfe\x00\x80"),
    "config.json is deep": wrote(CONFIG, "[" * 100_000),
    "config.json is a folder": instead(CONFIG, Path.mkdir),
    "config.json is a link to nothing": instead(CONFIG, lambda path: path.symlink_to("nowhere")),
    "no weights": without(WEIGHTS),
    "weights are empty": wrote(WEIGHTS, b""),
    "weights are text": wrote(WEIGHTS, "weights" * 100),
    "weights cut in the header": cut(WEIGHTS, 0.0005),
    "weights cut in a tensor": cut(WEIGHTS, 0.7),
    "header is no JSON": header(b"{nonsense"),
    "header is a list": header(b"[]"),
    "header is longer than the file": header(b"{}", 1 << 40),
    "header with an unknown dtype": header(b'{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,1]}}'),
    "header with a negative shape": header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'),
    "header with offsets that are words": header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":["0","4"]}}'),
    "weights are a folder": instead(WEIGHTS, Path.mkdir),
    "weights are a pipe": instead(WEIGHTS, os.mkfifo),
    "index is no JSON": wrote(INDEX, "{"),
    "index is a list": wrote(INDEX, "[]"),
    "index without a map": wrote(INDEX, "{}"),
    "index of a missing shard": index({Q: "model-00001-of-00002.safetensors"}),
    "index of another folder": index({Q: "../source/model.safetensors"}),
    "index with numbers": index({Q: 7}),
    "index whose map is a list": index([Q]),
}
SOURCES: dict[str, Break] = {
    "weights with NaN": tensors(lambda s: s[Q].fill_(float("nan"))),
    "config without model_type": set_in(CONFIG, "model_type", to=...),
    "model_type is a number": set_in(CONFIG, "model_type", to=7),
    "model_type is a list": set_in(CONFIG, "model_type", to=["llama"]),
    "architectures is a number": set_in(CONFIG, "architectures", to=7),
    "architectures of numbers": set_in(CONFIG, "architectures", to=[7, None]),
    "hidden_size is a word": set_in(CONFIG, "hidden_size", to="wide"),
    "hidden_size is another": set_in(CONFIG, "hidden_size", to=64),
    "heads are none": set_in(CONFIG, "num_attention_heads", to=0),
    "layers are negative": set_in(CONFIG, "num_hidden_layers", to=-1),
    "text_config is a word": set_in(CONFIG, "text_config", to="text"),
    "tie_word_embeddings is a word": set_in(CONFIG, "tie_word_embeddings", to="perhaps"),
    "quantization_config is a word": set_in(CONFIG, "quantization_config", to="some"),
    "dtype is unknown": set_in(CONFIG, "dtype", to="float7"),
    "tensors are missing": tensors(lambda s: [s.pop(name) for name in list(s) if ".1." in name]),
    "a tensor too many": tensors(lambda s: s.update(stray=torch.zeros(3))),
    "a tensor of another shape": tensors(lambda s: s.update({Q: torch.zeros(64, 128, dtype=torch.bfloat16)})),
    "no tokenizer": without("tokenizer.json"),
    "tokenizer is no JSON": wrote("tokenizer.json", "{"),
    "tokenizer of nothing": wrote("tokenizer.json", "{}"),
    "tokenizer_config is a list": wrote("tokenizer_config.json", "[]"),
    "only pickles": pickles,
    "an adapter": an_adapter,
}
MANIFEST = "kappaquant.json"
CHECKPOINTS: dict[str, Break] = {
    "no manifest": without(MANIFEST),
    "manifest is no JSON": wrote(MANIFEST, "{"),
    "manifest is a list": wrote(MANIFEST, "[]"),
    "manifest of nothing": wrote(MANIFEST, "{}"),
    "manifest without tensors": set_in(MANIFEST, "tensors", to=...),
    "manifest whose tensors are a list": set_in(MANIFEST, "tensors", to=[1]),
    "manifest with a shape of words": set_in(MANIFEST, "tensors", Q, "shape", to=["a", "b"]),
    "manifest of another version": set_in(MANIFEST, "format_version", to=99),
    "manifest without hashes": set_in(MANIFEST, "sha256", to=...),
    "manifest whose plan is a word": set_in(MANIFEST, "plan", to="plan"),
    "map of a format nobody knows": set_in(CONFIG, "quantization_config", "tensors", Q, to="tq3g77"),
    "map of numbers": set_in(CONFIG, "quantization_config", "tensors", Q, to=3),
    "map is a list": set_in(CONFIG, "quantization_config", "tensors", to=[]),
    "codebooks of words": set_in(CONFIG, "quantization_config", "codebooks", to={"tq3g64": ["a"]}),
    "codebooks are a list": set_in(CONFIG, "quantization_config", "codebooks", to=[]),
    "another quant_method": set_in(CONFIG, "quantization_config", "quant_method", to="gptq"),
    "quant_method is a list": set_in(CONFIG, "quantization_config", "quant_method", to=[]),
    "quantization_config is a word": set_in(CONFIG, "quantization_config", to="some"),
    "hidden_size is a word": set_in(CONFIG, "hidden_size", to="wide"),
    "heads are none": set_in(CONFIG, "num_attention_heads", to=0),
    "model_type is unknown": set_in(CONFIG, "model_type", to="nonsense"),
    "architectures is a number": set_in(CONFIG, "architectures", to=7),
    "norms are missing": tensors(lambda s: s.pop(f"{Q}.tq_norms")),
    "codes of another shape": tensors(lambda s: s.update({f"{Q}.tq_packed": s[f"{Q}.tq_packed"][:-1].clone()})),
    "no tokenizer": without("tokenizer.json"),
    "tokenizer is no JSON": wrote("tokenizer.json", "{"),
    "chat template is broken": wrote("chat_template.jinja", "{% for m in %}"),
    "chat template raises": wrote("chat_template.jinja", "{{ raise_exception('no') }}{{ 1/0 }}"),
    "chat template reads what is not there": wrote("chat_template.jinja", "{{ messages[7].content.x }}"),
    "generation_config is no JSON": wrote("generation_config.json", "{"),
    "generation_config of words": wrote("generation_config.json", '{"eos_token_id": "two"}'),
    "evaluation is no JSON": wrote("evaluation.json", "{"),
    "evaluation of another version": wrote("evaluation.json", '{"format_version": 7}'),
    "evaluation of nothing": wrote("evaluation.json", '{"format_version": 1}'),
}  # fmt: skip
