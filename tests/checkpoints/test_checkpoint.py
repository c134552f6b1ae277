"""A checkpoint gives back exactly what was put in, by name, and says what is wrong with a damaged one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from builders import EXPERTS, Q, tensors, write_source
from safetensors.torch import load_file, save_file

import kappaquant
from kappaquant import FormatError
from kappaquant.formats import codec
from kappaquant.formats.codebook import NORMS_SUFFIX, PACKED_SUFFIX, CodebookFormat, published_codebook


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("checkpoint") / "source", shards=2)


@pytest.fixture(scope="module")
def written(source: Path) -> dict[str, Path]:
    opened = kappaquant.open_source(source)
    plan = kappaquant.make_plan(opened.tensors, opened.config, overrides=[(Q, 4)])
    return {
        target: kappaquant.quantize(opened, source.parent / target, plan, kappaquant.Options(container=target))  # type: ignore[arg-type]
        for target in ("kappaquant", "tq3_native")
    }


@pytest.mark.parametrize("target", ["kappaquant", "tq3_native"])
def test_both_formats_look_the_same(target: str, source: Path, written: dict[str, Path]) -> None:
    checkpoint, content = kappaquant.open_checkpoint(written[target], source=source), tensors()
    assert checkpoint.container.id == target
    assert checkpoint.notices == []
    assert checkpoint.keys() == sorted(content)
    legacy = target == "tq3_native"
    for name, bits in ((Q, 4), (EXPERTS, 3), ("model.layers.0.self_attn.o_proj.weight", 3)):
        shape = tuple(content[name].shape)
        book = published_codebook(bits, 128) if legacy else None
        fmt = CodebookFormat(bits, 128, book, "F32" if legacy else "F16")
        assert (checkpoint.bits(name), checkpoint.format_of(name), checkpoint.shape(name)) == (bits, fmt, shape)
        parts = checkpoint.parts(name)
        assert {s: tuple(part.shape) for s, part in parts.items()} == {s: p for s, (_, p) in fmt.parts(shape).items()}
        assert parts[NORMS_SUFFIX].dtype == (torch.float32 if legacy else torch.float16)
        again = codec.decode(parts[PACKED_SUFFIX], parts[NORMS_SUFFIX], fmt, shape[-1])
        whole = checkpoint.dequantize(name)
        assert whole.shape == shape
        assert torch.equal(whole, again)
        rows = checkpoint.entry(name).read_rows(5, 40)
        assert torch.equal(rows, whole.view(-1, shape[-1])[5:40])
    norm = checkpoint.tensor("model.norm.weight")
    assert torch.equal(norm, content["model.norm.weight"].to(torch.float16 if legacy else torch.bfloat16))
    assert checkpoint.dequantize("model.norm.weight").dtype == torch.float32
    assert torch.equal(checkpoint.tensor("model.steps"), torch.arange(5))
    stored = sum(checkpoint.nbytes(name) for name in checkpoint.keys())
    assert stored == sum(t.nbytes for p in written[target].glob("*.safetensors") for t in load_file(p).values())


def test_the_codes_are_those_of_the_encoder(written: dict[str, Path]) -> None:
    checkpoint = kappaquant.open_checkpoint(written["kappaquant"])
    encoded = codec.encode(tensors()[EXPERTS], CodebookFormat(3, 128))
    parts = checkpoint.parts(EXPERTS)
    assert parts.keys() == encoded.parts.keys()
    assert all(torch.equal(part, encoded.parts[suffix]) for suffix, part in parts.items())
    assert checkpoint.format_of(EXPERTS) == CodebookFormat(3, 128)


def test_questions_that_have_no_answer(written: dict[str, Path]) -> None:
    checkpoint = kappaquant.open_checkpoint(written["kappaquant"])
    with pytest.raises(FormatError, match=r"no parameter 'model\.none'"):
        checkpoint.bits("model.none")
    with pytest.raises(FormatError, match=f"{Q}: is quantized to 4 bits; decode it"):
        checkpoint.tensor(Q)
    with pytest.raises(FormatError, match=r"model\.norm\.weight: is kept as BF16; it has no parts"):
        checkpoint.parts("model.norm.weight")


def test_a_plan_that_keeps_everything(source: Path, tmp_path: Path) -> None:
    opened = kappaquant.open_source(source)
    plan = kappaquant.make_plan(opened.tensors, opened.config, bits=16)
    options = kappaquant.Options(allow_nothing=True)
    checkpoint = kappaquant.open_checkpoint(kappaquant.quantize(opened, tmp_path / "out", plan, options))
    for name, tensor in tensors().items():
        assert torch.equal(checkpoint.tensor(name), tensor)
    with pytest.raises(kappaquant.PlanError, match="keeps every tensor"):
        kappaquant.quantize(opened, tmp_path / "old", plan, kappaquant.Options(container="tq3_native"))
    assert not (tmp_path / "old").exists()


def test_what_is_not_a_checkpoint(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="none: no such folder"):
        kappaquant.open_checkpoint(tmp_path / "none")
    with pytest.raises(FormatError, match="not quantized; expected quant_method 'kappaquant'"):
        kappaquant.open_checkpoint(source)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(FormatError, match="quantized by gptq"):
        kappaquant.open_checkpoint(tmp_path)


def test_a_missing_shard_is_a_defect_of_the_format(written: dict[str, Path], source: Path, tmp_path: Path) -> None:
    for target, folder in written.items():
        copy = shutil.copytree(folder, tmp_path / target)
        (copy / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(FormatError, match=r"model-00002-of-00002\.safetensors: named by .* but missing"):
            kappaquant.open_checkpoint(copy, source=source)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "..\\x.safetensors", "a/x.safetensors"])
def test_an_index_that_leaves_the_folder(name: str, written: dict[str, Path], source: Path, tmp_path: Path) -> None:
    for target, folder in written.items():
        copy = shutil.copytree(folder, tmp_path / target)
        index = copy / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("model-00001-of-00002.safetensors", name.replace("\\", "\\\\")))
        with pytest.raises(FormatError, match=r"leave.* the folder"):
            kappaquant.open_checkpoint(copy, source=source)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norms_that_are_not_finite_fail_verify(
    bad: float, written: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    for target, folder in written.items():
        copy = shutil.copytree(folder, tmp_path / target)
        shard = kappaquant.open_checkpoint(copy, source=source).entry(Q).parts[".tq_norms"][0]
        content = load_file(shard)
        content[f"{Q}.tq_norms"].view(-1)[3] = bad
        save_file(content, shard)
        problems = list(kappaquant.open_checkpoint(copy, source=source).verify())
        assert any(p.startswith(f"{Q}.tq_norms: holds a norm that is NaN or infinite") for p in problems)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.tq_norms"), rf"{Q}: packed in .* but its tq_norms are in no shard"),
        (lambda t: t.pop(f"{Q}.tq_packed"), rf"{Q}\.tq_norms: norms in .* without their tq_packed"),
        (lambda t: t.update({Q: torch.zeros(2, 2)}), rf"{Q}: kept in .* and packed as well"),
        (lambda t: t.update({f"{Q}.tq_norms": t[f"{Q}.tq_norms"].half()}), rf"{Q}\.tq_norms: .* needs F32"),
        (lambda t: t.update({f"{Q}.tq_packed": t[f"{Q}.tq_packed"][:, 1:].clone()}), rf"{Q}\.tq_packed: 63 bytes"),
        (lambda t: t.update({f"{Q}.tq_packed": t[f"{Q}.tq_packed"][1:].clone()}), rf"{Q}\.tq_packed: .* needs U8"),
        (lambda t: t.update({"x.tq_packed": t[f"{Q}.tq_packed"].clone()}), "x: packed in .* in no shard"),
    ],
)  # fmt: skip
def test_damaged_published_files(change, message: str, written: dict[str, Path], source: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    copy = shutil.copytree(written["tq3_native"], tmp_path / "copy")
    shard = kappaquant.open_checkpoint(copy, source=source).entry(Q).parts[".tq_packed"][0]
    content = load_file(shard)
    change(content)
    save_file(content, shard)
    with pytest.raises(FormatError, match=message):
        kappaquant.open_checkpoint(copy, source=source)


def test_a_binary_code(tmp_path: Path) -> None:
    """1-bit tq3_native files exist; nothing here writes them."""
    folder = tmp_path / "one"
    folder.mkdir()
    codes = torch.randint(0, 2, (4, 128), dtype=torch.uint8)
    norms = torch.rand(4, 1)
    save_file({"w.tq_packed": codes, "w.tq_norms": norms}, folder / "model.safetensors")
    (folder / "tq_config.json").write_text('{"format": "tq3_native", "bits": 1, "group_size": 128}')
    checkpoint = kappaquant.open_checkpoint(folder, shapes={"w": (4, 128)})
    assert checkpoint.bits("w") == 1
    c = (2 / torch.pi) ** 0.5 / 128**0.5
    expected = codec.unrotate(torch.where(codes == 1, c, -c), 128) * norms
    torch.testing.assert_close(checkpoint.dequantize("w"), expected, rtol=2e-3, atol=1e-6)


def test_shapes_may_be_a_function_of_config_and_names(tmp_path: Path) -> None:
    part = {"tq_packed": torch.zeros(4, 128, dtype=torch.uint8), "tq_norms": torch.ones(4, 1)}
    save_file({f"{name}.{end}": t.clone() for name in "vw" for end, t in part.items()}, tmp_path / "model.safetensors")
    (tmp_path / "tq_config.json").write_text('{"format": "tq3_native", "bits": 1, "group_size": 128}')
    asked = []
    checkpoint = kappaquant.open_checkpoint(
        tmp_path, shapes=lambda config, names: asked.append((config, sorted(names))) or {"v": None, "w": (4, 128)}
    )
    assert asked == [({}, ["v", "w"])]
    assert checkpoint.keys() == ["w"]
    with pytest.raises(FormatError, match="v: the model has no parameter of this name"):
        kappaquant.open_checkpoint(tmp_path, shapes=lambda config, names: {"w": (4, 128)})
