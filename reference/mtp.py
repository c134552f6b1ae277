"""The reference model's multi-token-prediction layer: what it computes, how often its guess is right, a folder with it.

python -m reference.mtp --out FOLDER        # reference/model with the committed layer, as one checkpoint
python -m reference.mtp                     # how many of its guesses the model takes
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3_5MoeTextConfig, Qwen3_5MoeTextModel
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeRMSNorm

from reference.evaluate import MAX_NEW_TOKENS, MODEL
from reference.text import problems, scenes

LAYER = Path(__file__).parent / "mtp_layer" / "mtp.safetensors"
#: Prompts that guesses are counted on: arithmetic stories, and the first half of scenes.
PROMPTS = (60, 30)
_SEED = 9  # of no other measurement here


class Predictor(nn.Module):
    """One full-attention layer that guesses the token after the next, by the definition of Qwen3.5's own.

    At position i it joins the embedding of token i + 1 and the model's last hidden state at i (after the model's final
    norm), each normed by itself, in this order; a matrix halves their width; a decoder layer and a norm follow. The
    model's head makes logits of what comes out: those of token i + 2.
    """

    def __init__(self, config: Qwen3_5MoeTextConfig) -> None:
        super().__init__()
        one = copy.deepcopy(config)
        one.num_hidden_layers, one.layer_types, one.vocab_size = 1, ["full_attention"], 1
        self.pre_fc_norm_embedding = Qwen3_5MoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_fc_norm_hidden = Qwen3_5MoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.body = Qwen3_5MoeTextModel(one)
        del self.body.embed_tokens  # the model's own is used

    def forward(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Embeddings of tokens 1 to n and hidden states of tokens 0 to n - 1, both [rows, n, width], to [rows, n, width]."""
        joined = torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)], dim=-1)
        return self.body(inputs_embeds=self.fc(joined), use_cache=False).last_hidden_state

    def tensors(self) -> dict[str, Tensor]:
        """The weights under the names that checkpoints give them."""
        return {f"mtp.{name.removeprefix('body.')}": tensor for name, tensor in self.state_dict().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take weights by those names; RuntimeError where one is missing or more than the layer has."""
        inner = {name.removeprefix("mtp."): tensor for name, tensor in tensors.items()}
        self.load_state_dict(
            {f"body.{name}" if name.startswith(("layers.", "norm.")) else name: t for name, t in inner.items()}
        )


def predict(model: Any, predictor: Predictor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(the model's logits of tokens 2 to n, the predictor's of tokens 2 to n + 1), [rows, n - 1, vocabulary], for ids [rows, n].

    The last of the predictor's have no counterpart: both are [rows, n - 1, ...] where the model's begin at position 1.
    """
    with torch.no_grad():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, 1:])
        embedded = model.model.embed_tokens(ids[:, 1:])
    return logits, model.lm_head(predictor(embedded, hidden[:, :-1]))


@torch.inference_mode()
def acceptance(model: Any, predictor: Predictor, prompts: Sequence[list[int]]) -> dict[str, Any]:
    """Guesses made and taken when each prompt is answered greedily and one token is guessed at a time.

    A step of speculative decoding checks one guess: where it is right, two tokens are gained and the next guess is two
    positions on, else one. Counted here on the finished answers, which the guesses do not change.
    """
    guesses = taken = tokens = 0
    for prompt in prompts:
        start = torch.tensor([prompt], device=model.device)
        ids = model.generate(input_ids=start, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        guessed = predict(model, predictor, ids)[1].argmax(-1)[0]
        at, end = len(prompt), ids.shape[1] - 1  # the token at ``at`` is known; the one after it is guessed
        tokens += end + 1 - len(prompt)
        while at < end:
            right = bool(guessed[at - 1] == ids[0, at + 1])
            guesses, taken, at = guesses + 1, taken + right, at + 1 + right
    share = taken / guesses
    return {
        "prompts": len(prompts),
        "tokens": tokens,
        "guesses": guesses,
        "accepted": taken,
        "acceptance": round(share, 4),
        "mean_accepted_length": round(1 + share, 4),
    }


def held_out_prompts(tokenizer: Any) -> dict[str, list[list[int]]]:
    """Prompts that no training saw, as token ids."""
    stories = [problem.prompt for problem in problems(_SEED, PROMPTS[0])]
    prose = [ids[: len(ids) // 2] for ids in tokenizer(scenes(_SEED, PROMPTS[1]))["input_ids"]]
    return {"stories": tokenizer(stories)["input_ids"], "prose": prose}


def measure(model: Any, predictor: Predictor, tokenizer: Any) -> dict[str, Any]:
    """Acceptance on each kind of held-out prompt."""
    return {kind: acceptance(model, predictor, prompts) for kind, prompts in held_out_prompts(tokenizer).items()}


def assemble(folder: Path, layer: Path = LAYER) -> Path:
    """Write the reference model and its MTP layer as one checkpoint, whose config.json says that it has one.

    ``mrope_section`` goes: text has one position a token. vLLM 0.32 drops it for the model, but not for the layer, which
    its CPU kernels would then run on positions of another shape, past the end of its queries.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in MODEL.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, folder / path.name)
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    config["mtp_num_hidden_layers"] = 1
    del config["rope_parameters"]["mrope_section"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = load_file(MODEL / "model.safetensors") | load_file(layer)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(layer: Path = LAYER, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Predictor]:
    """The reference model and its MTP layer, to evaluate."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()
    predictor = Predictor(model.config)
    predictor.load(load_file(layer))
    return model, predictor.to(dtype).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the whole checkpoint")
    args = parser.parse_args()
    if args.out:
        print(f"{args.out}: {(assemble(args.out) / 'model.safetensors').stat().st_size:,} bytes of weights")
        return
    print(json.dumps(measure(*load(), AutoTokenizer.from_pretrained(MODEL)), indent=2))


if __name__ == "__main__":
    main()
