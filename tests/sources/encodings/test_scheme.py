"""What config.json may say of stored weights."""

from __future__ import annotations

from typing import Any

import pytest
from paths import ROOT

from kappaquant import AlreadyQuantizedError, SourceError
from kappaquant.sources.encodings import scheme
from kappaquant.sources.encodings.scheme import Scheme, find_scheme, with_modelopt, without_scheme

DOCUMENT = ROOT / "docs" / "sources.md"


def compressed(**said: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized", **said}}


def group(**weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"quantization_config": {}}, None),
        ({"quantization_config": {"quant_method": "fp8"}}, Scheme("fp8", ((128, 128),))),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}, Scheme("fp8", ())),
        ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, Scheme("mxfp4", ())),
        ({"compression_config": compressed()["quantization_config"]}, Scheme("compressed-tensors", ())),
        (compressed(**group(block_structure=[64, 128])), Scheme("compressed-tensors", ((64, 128),))),
        (compressed(**group(block_structure="64x128")), Scheme("compressed-tensors", ((64, 128),))),
        (compressed(**group(group_size=32)), Scheme("compressed-tensors", ((1, 32),))),
        (compressed(sparsity_config={"format": "dense"}, transform_config={}), Scheme("compressed-tensors", ())),
    ],
)
def test_what_is_read(config: dict[str, Any], expected: Scheme | None) -> None:
    assert find_scheme("m", config) == expected


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, AlreadyQuantizedError, "m: already quantized by gptq .config.json"),
        ({"quantization_config": {"bits": 4}}, AlreadyQuantizedError, "by an unnamed method"),
        ({"quantization_config": "fp8"}, AlreadyQuantizedError, "by fp8"),
        (compressed(format="int-quantized"), AlreadyQuantizedError, "as int-quantized"),
        (compressed(config_groups={"a": {"format": "pack-quantized"}}), AlreadyQuantizedError, "as pack-quantized"),
        (compressed(transform_config={"config_groups": {"R1": {}}}), AlreadyQuantizedError, "transform_config"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), AlreadyQuantizedError, "sparsity_config"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}, SourceError, r"blocks of \[128\]"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 1]}}, SourceError, "at least 1"),
        (compressed(**group(block_structure="wide")), SourceError, "blocks of 'wide'"),
    ],
)  # fmt: skip
def test_what_is_refused(config: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        find_scheme("m", config)


def test_modelopts_own_file_counts_where_config_json_says_nothing() -> None:
    document = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    assert with_modelopt({"a": 1}, document) == {
        "a": 1, "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    }  # fmt: skip
    said = {"quantization_config": {"quant_method": "fp8"}}
    assert with_modelopt(said, document) == said


def test_the_config_without_it_is_that_of_the_model() -> None:
    config = {"a": 1, **compressed(), "text_config": {"b": 2, **compressed()}, "compression_config": {}}
    assert without_scheme(config) == {"a": 1, "text_config": {"b": 2}}


def test_the_document_lists_what_is_read() -> None:
    """Every method and format that the code reads has a row, and no row is of another."""
    table = DOCUMENT.read_text(encoding="utf-8").partition("| quant_method, format |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in row.replace("`", "").replace(",", " ").split()}
    assert named == {*scheme.METHODS, *scheme._COMPRESSED}
