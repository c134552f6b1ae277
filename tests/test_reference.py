"""The reference model: its text, its rescaling and what the committed checkpoint can do."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3_5MoeForCausalLM

from kappaquant.evaluate.runs.questions import read_questions
from reference.build import END, model_config
from reference.evaluate import MODEL, exact_match, perplexity, wilson
from reference.rescale import TARGETS, check_same_function, family_of, kappa, rescale
from reference.text import extract_answer, problems, prose, scenes


def test_text_is_the_same_for_the_same_seed_only():
    assert problems(3, 50) == problems(3, 50)
    assert problems(3, 50) != problems(4, 50)
    assert prose(3, 2000) == prose(3, 2000)
    assert len(prose(3, 2000)) == 2000
    assert problems(3, 60)[:50] == problems(3, 50)


def test_text_does_not_depend_on_the_hash_seed():
    code = "from reference.text import problems, prose; print(problems(5, 3), prose(5, 500))"
    root = Path(__file__).parents[1]
    runs = {subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout}
    runs.add(f"{problems(5, 3)} {prose(5, 500)}\n")
    assert len(runs) == 1


def test_training_and_held_out_text_are_disjoint():
    held_out = {p.prompt for seed in range(3) for p in problems(seed, 500)}
    train = {p.prompt for seed in range(3) for p in problems(seed, 5000, "train")}
    assert len(held_out) > 1000
    assert not held_out & train
    assert not set(scenes(0, 200)) & set(scenes(0, 2000, "train"))


def test_every_worked_step_is_right_and_ends_in_the_answer():
    apply = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    for problem in problems(11, 2000):
        steps = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)\.", problem.worked)
        assert 2 <= len(steps) <= 4
        for a, sign, b, result in steps:
            assert apply[sign](int(a), int(b)) == int(result)
            assert sign != "/" or int(a) % int(b) == 0
        assert int(steps[-1][3]) == problem.answer == extract_answer(problem.worked)


@pytest.mark.parametrize(
    ("text", "answer"), [(" 1+1=2. #### 2", 2), ("#### -7 #### 8", -7), ("1+1=2.", None), ("", None)]
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_wilson_interval_against_known_values():
    low, high = wilson(90, 100)
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)
    assert wilson(300, 300)[1] == pytest.approx(1.0)


def _small_model():
    config = model_config()
    config.num_experts, config.vocab_size = 4, 64
    torch.manual_seed(0)
    weights = dict(Qwen3_5MoeForCausalLM(config).state_dict())
    for name in weights:
        if "norm" in name:
            weights[name] = weights[name] + 0.3 * torch.randn_like(weights[name])
    return config, weights


@pytest.mark.slow
def test_rescaling_makes_tails_and_changes_no_logit():
    config, weights = _small_model()
    scaled = rescale(weights, config)
    ids = torch.randint(0, 64, (2, 90))
    assert check_same_function(Qwen3_5MoeForCausalLM, config, weights, scaled, ids) <= 1e-9
    for name, weight in scaled.items():
        family = family_of(name)
        if family in ("routed gate_up", "routed down", "shared down", "out_proj"):
            assert abs(kappa(weights[name])) < 0.2
            assert kappa(weight) == pytest.approx(TARGETS[family], rel=0.25), name
    moved = scaled["model.layers.0.mlp.shared_expert.down_proj.weight"].clone()
    moved[0] *= 1.001
    broken = {**scaled, "model.layers.0.mlp.shared_expert.down_proj.weight": moved}
    with pytest.raises(ValueError, match="changed the logits"):
        check_same_function(Qwen3_5MoeForCausalLM, config, weights, broken, ids)


def test_kappa_is_excess_kurtosis():
    assert kappa(torch.tensor([1.0, -1.0])) == pytest.approx(-2)
    assert kappa(torch.randn(400_000, generator=torch.Generator().manual_seed(0))) == pytest.approx(0, abs=0.05)


def test_committed_checkpoint_fits_and_every_group_axis_is_whole():
    file = MODEL / "model.safetensors"
    assert file.stat().st_size <= 12_000_000
    with safe_open(file, "pt") as handle:
        for name in handle.keys():
            part = handle.get_slice(name)
            assert part.get_dtype() == "BF16", name
            if family_of(name) not in (None, "conv1d"):
                assert part.get_shape()[-1] % 128 == 0, name


def test_committed_profile_matches_the_recorded_one():
    recorded = json.loads((MODEL.parent / "results.json").read_text())["kappa"]["committed"]
    with safe_open(MODEL / "model.safetensors", "pt") as handle:
        routers = [kappa(handle.get_tensor(n)) for n in handle.keys() if family_of(n) == "router"]
    assert sum(routers) / len(routers) == pytest.approx(recorded["router"]["mean"], abs=0.01)
    assert recorded["router"]["mean"] > 15
    assert recorded["routed gate_up"]["mean"] < 4


def test_tokenizer_reads_the_same_through_every_class():
    auto = AutoTokenizer.from_pretrained(MODEL)
    plain = PreTrainedTokenizerFast(tokenizer_file=str(MODEL / "tokenizer.json"))
    for text in [p.prompt + p.worked + END for p in problems(2, 40)] + scenes(2, 20):
        ids = auto(text)["input_ids"]
        assert ids == plain(text)["input_ids"]
        assert auto.decode(ids) == text
    chat = auto.apply_chat_template([{"role": "user", "content": "How many?"}], tokenize=False)
    assert chat == "Question: How many?\nAnswer:"


def test_committed_model_answers_unseen_problems():
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert type(model).__name__ == "Qwen3_5MoeForCausalLM"
    assert exact_match(model, tokenizer, problems(77, 24)) >= 20
    assert perplexity(model, tokenizer, scenes(77, 20)) < 2.6


def test_the_reference_models_text_is_what_its_script_makes() -> None:
    from reference.held_out import PATH, held_out_text

    assert PATH.read_text(encoding="utf-8") == held_out_text()
    assert PATH.stat().st_size < 60_000


def test_the_reference_models_questions_are_what_its_script_makes() -> None:
    from reference.held_out import QUESTIONS, held_out_questions

    assert QUESTIONS.read_text(encoding="utf-8") == held_out_questions()
    assert len(read_questions(QUESTIONS)) == 300
