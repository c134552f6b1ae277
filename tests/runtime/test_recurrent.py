"""GatedDeltaNet over prompts against transformers' own modules."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3_5MoeTextConfig
from transformers.cache_utils import DynamicCache
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet, torch_chunk_gated_delta_rule

from kappaquant.runtime import recurrent
from kappaquant.runtime.recurrent import PromptMixer, delta_rule


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("state_bytes", [1 << 28, 1])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("tokens", [1, 63, 64, 200])
def test_the_rule_is_transformers(tokens: int, first: bool, state_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent, "_STATE_BYTES", state_bytes)  # states of all chunks, or of one, at a time
    batch, key_heads, heads, dk, dv = 2, 2, 6, 16, 24
    q, k = random(batch, tokens, key_heads, dk), random(batch, tokens, key_heads, dk, seed=1)
    v = random(batch, tokens, heads, dv, seed=2)
    decay, beta = -random(batch, tokens, heads, seed=3).exp(), random(batch, tokens, heads, seed=4).sigmoid()
    state = None if first else random(batch, heads, dk, dv, seed=5)
    wide_q, wide_k = (x.repeat_interleave(heads // key_heads, dim=2) for x in (q, k))
    expected, last = torch_chunk_gated_delta_rule(
        wide_q, wide_k, v, g=decay, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    out, after = delta_rule(q, k, v, decay, beta, state)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, last, rtol=1e-4, atol=1e-5)
    assert out.is_contiguous()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_rule_is_the_same_on_a_gpu() -> None:
    q, k, v = random(2, 200, 2, 128), random(2, 200, 2, 128, seed=1), random(2, 200, 6, 128, seed=2)
    decay, beta = -random(2, 200, 6, seed=3).exp(), random(2, 200, 6, seed=4).sigmoid()
    given = (q, k, v, decay, beta, random(2, 6, 128, 128, seed=5))
    for mine, expected in zip(delta_rule(*(x.cuda() for x in given)), delta_rule(*given), strict=True):
        assert float((mine.cpu() - expected).norm() / expected.norm()) < 1e-4


def module() -> Qwen3_5MoeGatedDeltaNet:
    torch.manual_seed(0)
    config = Qwen3_5MoeTextConfig(
        hidden_size=48, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=8,
    )  # fmt: skip
    return Qwen3_5MoeGatedDeltaNet(config, 0).eval()


@torch.no_grad()
def test_a_module_reads_prompts_and_goes_on() -> None:
    """Two prompts of one cache, the first with padding, then a step: outputs and what the cache holds."""
    plain = module()
    mixer, mask = PromptMixer(plain), torch.ones(2, 70)
    mask[1, :5] = 0
    runs = []
    for forward in (plain.forward, mixer):
        cache = DynamicCache(config=Qwen3_5MoeTextConfig(num_hidden_layers=1, layer_types=["linear_attention"]))
        outs = [forward(random(2, 70, 48), cache_params=cache, attention_mask=mask)]
        outs.append(forward(random(2, 9, 48, seed=1), cache_params=cache))
        outs.append(forward(random(2, 1, 48, seed=2), cache_params=cache))
        held = cache.layers[0]
        runs.append([*outs, held.conv_states[0], held.recurrent_states[0]])
    for mine, own in zip(runs[1], runs[0], strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixer(random(2, 70, 48)), plain(random(2, 70, 48)), rtol=1e-4, atol=1e-5)


def test_what_takes_the_modules_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = module()
    for installed, reason in ((True, "flash-linear-attention is installed"), (False, None)):
        monkeypatch.setattr(recurrent, "is_flash_linear_attention_available", lambda found=installed: found)
        assert PromptMixer.refusal(plain) == reason
    assert PromptMixer(plain)(random(1, 5, 48)).requires_grad
    plain.activation = "gelu"
    assert "gelu, not silu" in str(PromptMixer.refusal(plain))
