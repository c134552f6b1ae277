"""What makes a list of files a checkpoint, wherever it lies."""

from __future__ import annotations

import pytest

from kappaquant.errors import SourceError
from kappaquant.sources.source import INDEX_NAME, SINGLE_NAME, shard_names, side_files


def test_shards_are_those_of_the_index_or_the_only_file() -> None:
    index = {"weight_map": {"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}
    files = ["one.safetensors", "two.safetensors", INDEX_NAME]
    assert shard_names("m", files, index) == ["one.safetensors", "two.safetensors"]
    assert shard_names("m", [SINGLE_NAME, "other.safetensors"], None) == [SINGLE_NAME]
    assert shard_names("m", ["only.safetensors", "sub/other.safetensors"], None) == ["only.safetensors"]


@pytest.mark.parametrize(
    ("files", "index", "message"),
    [
        ([], None, "m: no safetensors files"),
        (["pytorch_model.bin"], None, "only as pickle .pytorch_model.bin., which can run code"),
        (["a.safetensors", "b.safetensors"], None, "2 safetensors files but no"),
        (["a.safetensors"], {"weight_map": {"w": "../a.safetensors"}}, "may not leave the folder"),
        (["a.safetensors"], {"weight_map": {"w": "b.safetensors"}}, "m/b.safetensors: named by .* but missing"),
        (["a.safetensors"], {"weight_map": []}, "has no weight_map"),
    ],
)
def test_lists_that_make_no_checkpoint(files: list[str], index: dict[str, object] | None, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        shard_names("m", files, index)


def test_what_is_carried_along() -> None:
    files = ["config.json", "tokenizer.json", "sub/LICENSE", "w.safetensors", "w.gguf", "w.bin", INDEX_NAME]
    assert side_files(files) == ["tokenizer.json", "sub/LICENSE"]
