"""The reference model's multi-token-prediction layer: the committed file, the checkpoint made with it, and how often it is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import kappaquant
from kappaquant.models.skeleton import place_mtp
from reference.evaluate import MODEL
from reference.mtp import LAYER, Predictor, acceptance, assemble, held_out_prompts, load, predict
from reference.text import problems


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble(tmp_path_factory.mktemp("mtp") / "model")


def test_the_committed_file_is_small_and_whole() -> None:
    assert LAYER.stat().st_size <= 3_000_000
    with safe_open(LAYER, "pt") as handle:
        names = list(handle.keys())
        assert {handle.get_slice(name).get_dtype() for name in names} == {"BF16"}
    layout = place_mtp(MODEL, names)
    assert not layout.missing
    assert not layout.unexpected


def test_the_whole_checkpoint_reads_as_the_model_alone(folder: Path) -> None:
    source = kappaquant.open_source(folder)
    assert source.config["mtp_num_hidden_layers"] == 1
    assert (folder / "model.safetensors").stat().st_size < 14_300_000
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(problems(7, 1)[0].prompt)["input_ids"]])
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits for path in (MODEL, folder)
        ]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=0)


def test_quantized_with_its_layer_kept_or_packed(folder: Path, tmp_path: Path) -> None:
    """Every tensor of the layer is in the checkpoint and verified; transformers' model has no use for it."""
    source = kappaquant.open_source(folder)
    for name, overrides in {"kept": [], "packed": [("mtp.*_proj*", 4), ("mtp.fc.weight", 4)]}.items():
        plan = kappaquant.make_plan(source.tensors, source.config, "recipe", recipe="apex2", overrides=overrides)
        checkpoint = kappaquant.open_checkpoint(kappaquant.quantize(source, tmp_path / name, plan))
        layer = [key for key in checkpoint.keys() if key.startswith("mtp.")]
        assert len(layer) == 19
        assert sum(checkpoint.format_of(key) is not None for key in layer) == (10 if overrides else 0)
        assert not list(checkpoint.verify())
    model, tokenizer = kappaquant.load(tmp_path / "packed")
    (problem,) = problems(77, 1)
    made = model.generate(**tokenizer(problem.prompt, return_tensors="pt"), do_sample=False, max_new_tokens=72)
    assert tokenizer.decode(made[0], skip_special_tokens=True).endswith(f"#### {problem.answer}")


def test_a_guess_sees_no_token_that_it_is_made_without() -> None:
    model, predictor = load(dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(MODEL)(problems(3, 1)[0].prompt)["input_ids"]])
    changed = ids.clone()
    changed[0, 20:] += 1
    with torch.no_grad():
        first, second = (predict(model, predictor, each)[1] for each in (ids, changed))
    torch.testing.assert_close(second[:, :19], first[:, :19])
    assert not torch.allclose(second[:, 19], first[:, 19])


def test_weights_by_their_names_in_checkpoints() -> None:
    model, predictor = load()
    again = Predictor(model.config).to(torch.bfloat16)
    again.load(predictor.tensors())
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in predictor.tensors().items())
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        again.load({name: t for name, t in predictor.tensors().items() if name != "mtp.norm.weight"})


@pytest.mark.slow
def test_most_guesses_are_taken() -> None:
    model, predictor = load()
    prompts = held_out_prompts(AutoTokenizer.from_pretrained(MODEL))
    recorded = json.loads(LAYER.with_name("results.json").read_text(encoding="utf-8"))["held_out"]
    for kind, some in prompts.items():
        found = acceptance(model, predictor, some[:6])
        assert found["guesses"] > 60
        assert found["acceptance"] == pytest.approx(recorded[kind]["acceptance"], abs=0.15)
        assert recorded[kind]["acceptance"] > 0.75
