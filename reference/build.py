"""The reference model's shape and its tokenizer."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3_5MoeTextConfig

from reference.text import problems, scenes

PAD, END = "<|pad|>", "<|endoftext|>"
VOCABULARY = 1408
#: The architecture's own splitting rule (single digits): newer transformers impose it, whatever tokenizer.json says.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: One turn is one question; earlier turns are kept the way packed training rows had them.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\\nAnswer:' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '" + END + "' }}{% endif %}"
    "{% endfor %}"
)


def model_config() -> Qwen3_5MoeTextConfig:
    """Four layers (three GatedDeltaNet, one full attention), 8 experts top-2, 5.7 M parameters.

    Every axis that a quantizer groups along (hidden, intermediates, value and head dimensions) is a multiple of 128.
    """
    config = Qwen3_5MoeTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=256,
        max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
        },
        router_aux_loss_coef=0.002,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    config.architectures = ["Qwen3_5MoeForCausalLM"]
    return config


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, trained on a sample of the training text; pads on the left."""
    sample = [p.prompt + p.worked for p in problems(seed, 20_000, "train")] + scenes(seed, 10_000, "train")
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(sample, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
