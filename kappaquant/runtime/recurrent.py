"""GatedDeltaNet over the tokens of a prompt, in torch: what transformers' modules compute, with few launches.

A prompt of some thousand tokens takes transformers' form a dozen launches for every 64 of them in every layer, and these, not
the card, are what it takes its time for. Here a chunk takes three; whatever does not wait for the chunk before it is done for all
chunks at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.import_utils import is_flash_linear_attention_available

CHUNK = 64
_STATE_BYTES = 1 << 28  # of the states of chunks that are alive at once


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gated delta rule (Yang, Kautz, Hatamizadeh, https://arxiv.org/abs/2412.06464), chunk by chunk, in float32.

    Every token t multiplies the state S by exp(log_decay_t), then moves what it gives for key_t towards value_t by beta_t, and
    reads it with query_t. Queries and keys are normalised first, and queries divided by sqrt(Dk).

    Args:
        query, key: [B, T, Hk, Dk]; each of their heads serves Hv // Hk neighbours.
        value: [B, T, Hv, Dv].
        log_decay, beta: [B, T, Hv]; decays are at most 0.
        state: [B, Hv, Dk, Dv] before the first token, None for zeros.

    Returns:
        (what is read [B, T, Hv, Dv] in query's dtype, the state after the last token in float32)
    """
    dtype, (batch, tokens, heads, _) = query.dtype, value.shape
    chunks = -(-tokens // CHUNK)

    def chunked(x: Tensor) -> Tensor:
        """[B, T, H, ...] -> float32 [B * Hv, chunks, CHUNK, ...], zeros behind the last token."""
        x = x.transpose(1, 2).float()
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, chunks * CHUNK - tokens))
        if x.shape[1] < heads:
            x = x.repeat_interleave(heads // x.shape[1], dim=1)
        return x.reshape(batch * heads, chunks, CHUNK, *x.shape[3:])

    q, k, v = chunked(query), chunked(key), chunked(value)
    q = q * (torch.rsqrt((q * q).sum(-1, keepdim=True) + 1e-6) * q.shape[-1] ** -0.5)
    k = k * torch.rsqrt((k * k).sum(-1, keepdim=True) + 1e-6)
    b, total = chunked(beta).unsqueeze(-1), chunked(log_decay).cumsum(-1)  # since the chunk began
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill_(future, float("-inf")).exp_()
    since, until = total.exp().unsqueeze(-1), (total[..., -1:] - total).exp().unsqueeze(-1)

    # within a chunk each value is what its key does not find of earlier ones: a triangular system (the UT transform)
    system = (k * b) @ k.transpose(-1, -2) * between
    solved = torch.linalg.solve_triangular(
        system, torch.cat([v * b, k * b * since], dim=-1), upper=False, unitriangular=True
    )
    # what is written, less what the state gives for these
    values, reading = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    attention = q @ k.transpose(-1, -2) * between
    q, k, decay = q * since, (k * until).transpose(-1, -2), total[..., -1].exp()[..., None, None]

    s = q.new_zeros(batch * heads, k.shape[-2], v.shape[-1]) if state is None else state.float().flatten(0, 1)
    step, outs = max(1, _STATE_BYTES // (4 * s.numel())), []
    for first in range(0, chunks, step):
        part = slice(first, first + step)
        states, written = [], []
        for reads, plain, keys, fade in zip(*(x[:, part].unbind(1) for x in (reading, values, k, decay)), strict=True):
            states.append(s)
            written.append(torch.baddbmm(plain, reads, s, alpha=-1))
            s = torch.baddbmm(s * fade, keys, written[-1])
        outs.append(q[:, part] @ torch.stack(states, 1) + attention[:, part] @ torch.stack(written, 1))
    out = torch.cat(outs, 1).view(batch, heads, chunks * CHUNK, -1)[:, :, :tokens]
    return out.transpose(1, 2).to(dtype).contiguous(), s.unflatten(0, (batch, heads))


class PromptMixer:
    """``forward`` of a GatedDeltaNet module for more than one token of each sequence; others go to the module's own."""

    def __init__(self, module: Any) -> None:
        self._module = module

    @staticmethod
    def refusal(module: Any) -> str | None:
        """Why the module's own form is needed, or better, or None."""
        if is_flash_linear_attention_available():
            return "flash-linear-attention is installed"
        return None if module.activation == "silu" else f"its convolution is followed by {module.activation}, not silu"

    def __call__(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]; ``attention_mask`` [B, T] is 0 for padding."""
        m, (batch, tokens, _) = self._module, hidden_states.shape
        if tokens == 1 or torch.is_grad_enabled() or kwargs.get("cu_seq_lens_q") is not None:
            out: Tensor = type(m).forward(
                m, hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs
            )
            return out
        x = hidden_states
        if attention_mask is not None:
            x = (x * attention_mask[:, :, None]).to(x.dtype)
        held = None if cache_params is None else cache_params.layers[m.layer_idx]
        state = held.recurrent_states[0] if held is not None and held.has_previous_state[0] else None
        mixed, z, b, a = m.in_proj_qkv(x).transpose(1, 2), m.in_proj_z(x), m.in_proj_b(x), m.in_proj_a(x)
        if cache_params is not None:  # with the tokens that the convolution still needs, in front
            mixed = cache_params.update_conv_state(mixed, m.layer_idx, conv_kernel_size=m.conv_kernel_size)
        mixed = _convolved(mixed, m.conv1d)[:, :, -tokens:].transpose(1, 2)
        q, k, v = mixed.split([m.key_dim, m.key_dim, m.value_dim], dim=-1)
        q, k = (t.unflatten(-1, (-1, m.head_k_dim)) for t in (q, k))
        log_decay = -m.A_log.float().exp() * F.softplus(a.float() + m.dt_bias)
        core, state = delta_rule(q, k, v.unflatten(-1, (-1, m.head_v_dim)), log_decay, b.sigmoid(), state)
        if cache_params is not None:
            cache_params.update_recurrent_state(state, m.layer_idx)
        core = m.norm(core.reshape(-1, m.head_v_dim), z.reshape(-1, m.head_v_dim))
        out = m.out_proj(core.view(batch, tokens, -1))
        return out


def _convolved(x: Tensor, conv: Any) -> Tensor:
    """silu of the causal convolution of each channel, [B, channels, T] -> the same in x's dtype."""
    weight, bias = conv.weight, conv.bias
    # there torch convolves channels one after another in 16 bits, several times slower than in 32
    if x.device.type == "cpu":
        weight, bias = weight.float(), None if bias is None else bias.float()
    convolved = F.conv1d(x.to(weight.dtype), weight, bias, padding=weight.shape[-1] - 1, groups=x.shape[1])
    return F.silu(convolved[:, :, : x.shape[-1]]).to(x.dtype)
