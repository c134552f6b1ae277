"""The benchmark of CPUs on tiny models: what is compared takes turns, and what is not there is said to be absent."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType, GGUFReader
from tiny_models import tiny_model

from benchmarks import cpu_decode, cpu_engines, cpu_gguf, cpu_models, cpu_products, cpu_report
from benchmarks.cpu_turns import Times, in_turns
from benchmarks.real_llamacpp import absent

WITHOUT_LLAMA = pytest.mark.skipif(absent() is None, reason="llama-cpp-python is installed here")


def tiny_config(layers: int) -> Any:
    """Of the large model's kind, layers as they are measured."""
    config = tiny_model("qwen3_5_moe_text").config
    config.num_hidden_layers, config.layer_types = layers, cpu_gguf.pattern(layers, cpu_gguf.FIRST)
    return config


def test_each_round_begins_with_the_next_and_the_first_is_not_counted() -> None:
    order: list[str] = []
    clock = itertools.count(1)

    def work(name: str) -> list[float]:
        order.append(name)
        return [float(next(clock)), 1e9, 0.0]

    found = in_turns({"a": "a", "b": "b", "c": "c"}, work, 2)
    assert "".join(order) == "cab" + "abc" + "bca"
    assert found["a"].rounds == (4.0, 9.0)
    assert found["b"].rounds == (5.0, 7.0)


def test_layers_are_what_more_of_them_take_longer() -> None:
    more, fewer = Times((0.9, 1.0, 1.4)), Times((0.5, 0.6, 0.2))
    layer = more.less(fewer, 4)
    assert layer.rounds == pytest.approx((0.1, 0.1, 0.3))
    assert layer.ratio(Times((0.2, 0.2, 0.2))) == pytest.approx(2)
    assert layer.to_json() == pytest.approx({"ms": 100, "least_ms": 100, "most_ms": 300})
    with pytest.raises(SystemExit, match="too busy"):
        fewer.less(more, 4)


def test_measured_layers_are_a_published_period() -> None:
    kinds = cpu_gguf.pattern(cpu_gguf.WHOLE)
    assert kinds.count("full_attention") == 10
    found = cpu_gguf.pattern(6, cpu_gguf.FIRST)
    assert found == kinds[cpu_gguf.FIRST :][:6]
    assert len(set(found[: cpu_gguf.FEWEST])) == 2
    assert found[cpu_gguf.FEWEST :].count("full_attention") == 1


def test_a_file_has_every_tensor_in_the_type_of_the_layer_whose_place_it_takes(tmp_path: Path) -> None:
    config, whole = tiny_config(6), tiny_config(2)
    whole.num_hidden_layers, whole.layer_types = 12, cpu_gguf.pattern(12)
    types: dict[str, Any] = {name: GGMLQuantizationType.F32 for name, _ in cpu_gguf.tensors(whole)}
    nbytes = cpu_gguf.write(tmp_path / "model.gguf", config, types)
    reader = GGUFReader(tmp_path / "model.gguf")
    read = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors}
    assert read == dict(cpu_gguf.tensors(config))
    assert read["blk.1.ffn_gate_exps.weight"] == (config.num_experts, config.moe_intermediate_size, config.hidden_size)
    recurrent = reader.fields["qwen35moe.attention.recurrent_layers"].contents()
    assert [not of_attention for of_attention in recurrent] == [f"blk.{n}.attn_q.weight" in read for n in range(6)]
    experts = sum(int(t.n_bytes) for t in reader.tensors if t.name.endswith("_exps.weight"))
    unread = experts * (1 - config.num_experts_per_tok / config.num_experts)
    unread += 4 * (config.vocab_size - 1) * config.hidden_size
    assert nbytes == round(sum(int(t.n_bytes) for t in reader.tensors) - unread)
    with pytest.raises(KeyError, match=r"blk\.7\.attn_q\.weight"):  # the first layer is the published eighth
        cpu_gguf.write(tmp_path / "other.gguf", config, {n: t for n, t in types.items() if n != "blk.7.attn_q.weight"})


@WITHOUT_LLAMA
def test_rows_of_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu_models, "qwen3_6", tiny_config)
    monkeypatch.setattr(cpu_models, "PROMPT", 40)
    monkeypatch.setattr(Times, "less", lambda self, other, parts: self)  # a tiny layer takes no time that could be told
    rows = list(cpu_models.layers(["uniform 4", "llama.cpp Q4_K_M"], 4, 1, 1, tmp_path))
    assert [(row["model"], row.get("what")) for row in rows] == [
        ("uniform 4", "decode"), ("uniform 4", "prompt"), ("llama.cpp Q4_K_M", None),
    ]  # fmt: skip
    decode, prompt, peer = rows
    assert (decode["tokens"], prompt["tokens"], decode["layers"]) == (1, 40, 4)
    assert decode["gb_per_s"] == pytest.approx(decode["weight_bytes"] / decode["ms"] / 1e6, abs=0.006)
    assert "not installed" in peer["absent"]
    assert cpu_decode.with_shares(rows, 1e9)[0]["of_bandwidth"] == pytest.approx(decode["gb_per_s"], abs=0.001)
    assert cpu_decode.table(cpu_decode.with_shares(rows, 1e9)).row_count == 3


def test_rows_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "last_cache", lambda: 1)  # or there would be thousands of copies
    rows = list(cpu_products.rows(1, (64, 256), (1, 3)))
    assert [(row["tokens"], row["what"]) for row in rows] == [
        (tokens, name)
        for tokens in (1, 3)
        for name in (
            *(f"{bits} bits" for bits in (2, 3, 4, 5, 6, 8)),
            *(f"trellis {bits}" for bits in (2, 3, 4)),
            cpu_products.PLAIN,
        )
    ]
    assert rows[0]["weight_bytes"] == 64 * (256 * 2 // 8 + 2 * 2)
    assert all(row["ms"] > 0 for row in rows)


def test_mistakes_are_met_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="pip install --target"):
        cpu_engines.take(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cpu_decode", "--layers", "3"])
    with pytest.raises(SystemExit):
        cpu_decode.main()
    assert "multiple of 4" in capsys.readouterr().err


def test_tables_show_what_is_there() -> None:
    row: dict[str, Any] = {"part": "layers", "ms": 2.0, "gb_per_s": 5.0, "of_bandwidth": 0.25, "tokens": 1}
    rows = [
        row | {"model": "uniform 4", "what": "decode", "times_faster_than": {"llama.cpp Q4_K_M": 1.5}},
        row | {"model": "uniform 4", "what": "prompt", "ms": 40.0, "times_faster_than": {"llama.cpp Q4_K_M": 0.5}},
        {"part": "layers", "model": "llama.cpp Q3_K_M", "absent": "not installed"},
        row | {"part": "products", "what": "4 bits", "rows": 8, "inputs": 4, "times_faster_than": {}},
        row
        | {
            "part": "products",
            "what": "4 bits",
            "rows": 8,
            "inputs": 4,
            "tokens": 64,
            "ms": 9.0,
            "times_faster_than": {},
        },
    ]
    head, cells = cpu_report.models(rows)
    assert head[-1] == "x llama.cpp Q4_K_M"
    assert cells == [["a layer of the 35 B model", "uniform 4", "2.00", "5.0 (25%)", "40.0", "1.50 / 0.50"]]
    head, cells = cpu_report.products(rows)
    assert head == ["ms, 8 x 4, tokens:", "1", "64", "of bandwidth, 1"]
    assert cells == [["4 bits", "2.00", "9.00", "25%"]]
    about = {"cpu": "A", "threads": 1, "load_before": 0.5}
    said = {
        "environment": about,
        "rounds": 2,
        "read_gb_per_s": 9.5,
        "native_core": "avx2",
        "llama.cpp": {"compiled_for": "CPU : AVX2 = 1 | F16C = 1"},
    }
    assert cpu_report.machine(said).endswith("Native core: avx2; llama.cpp: AVX2.")
    assert cpu_report.machine(said | {"llama.cpp": {"absent": "no"}}).endswith("llama.cpp: no.")
