"""A step of decoding in each instruction set, of sizes that fill no vector, against the same in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kappaquant.formats import codec
from kappaquant.formats.codebook import CodebookFormat, GroupedFormat
from kappaquant.formats.trellis import TrellisFormat
from kappaquant.kernels.base import Arranged
from kappaquant.kernels.cpu import step
from kappaquant.kernels.cpu.library import absence, core, levels, signs_of
from kappaquant.kernels.cpu.native import weight_of
from kappaquant.kernels.cpu.structures import Attention, DeltaNet, Matrix, Mlp, Moe

pytestmark = pytest.mark.skipif(bool(absence()), reason=absence())

HIDDEN, EPSILON = 76, 1e-5
LEVELS = [name for name, here in levels().items() if here]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Weights = dict[str, Tensor]


@pytest.fixture(params=LEVELS)
def stepper(request: pytest.FixtureRequest) -> step.Stepper:
    return step.Stepper(True, core(request.param))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def weights(dtype: torch.dtype, **shapes: tuple[int, ...]) -> Weights:
    return {name: (torch.randn(shape) * shape[-1] ** -0.5).to(dtype) for name, shape in shapes.items()}


def matrix(weight: Tensor, bias: Tensor | None = None) -> Matrix:
    return step.plain_matrix(weight, bias)


def gain(size: int) -> Tensor:
    return torch.rand(size) + 0.5


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight


def near(found: Tensor, expected: Tensor, tolerance: float = 3e-5) -> None:
    assert float((found.float() - expected.float()).norm() / expected.float().norm()) < tolerance


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, 1, dim]."""
    size = cos.shape[-1]
    turning, rest = x[..., :size], x[..., size:]
    halves = torch.cat([-turning[..., size // 2 :], turning[..., : size // 2]], -1)
    return torch.cat([turning * cos[:, None] + halves * sin[:, None], rest], -1)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "shared", "slots"), [(20, 1, 1), (36, 3, 255), (64, 5, 257), (24, 8, 700)])
def test_attention(stepper: step.Stepper, dim: int, shared: int, slots: int, dtype: torch.dtype, gated: bool) -> None:
    batch, kv_heads, room, rotary = 2, 2, slots + 5, dim // 2
    heads = kv_heads * shared
    w = weights(
        dtype, q=(heads * dim * (1 + gated), HIDDEN), k=(kv_heads * dim, HIDDEN), v=(kv_heads * dim, HIDDEN),
        out=(HIDDEN, heads * dim),
    )  # fmt: skip
    q_bias, gains = torch.randn(heads * dim * (1 + gated)), [gain(HIDDEN), gain(dim), gain(dim)]
    norms = [step.norm(each, EPSILON, plus_one=False) for each in gains]
    layer = Attention(
        matrix(w["q"], q_bias),
        matrix(w["k"]),
        matrix(w["v"]),
        matrix(w["out"]),
        *norms,
        heads,
        kv_heads,
        dim,
        0.3,
        gated,
    )
    keys, values = (torch.randn(batch, kv_heads, room, dim).to(dtype) for _ in range(2))
    mask = torch.zeros(batch, 1, 1, room)
    mask[1, ..., : slots // 2] = torch.finfo(torch.float32).min
    angles = torch.rand(batch, 1, rotary // 2).repeat(1, 1, 2)
    cos, sin, x = angles.cos(), angles.sin(), torch.randn(batch, 1, HIDDEN)

    y = rms(x, gains[0])
    q = F.linear(y, w["q"].float(), q_bias).view(batch, heads, 1, -1)
    q, gate = q.split(dim, -1) if gated else (q, None)
    k, v = (F.linear(y, w[name].float()).view(batch, kv_heads, 1, dim) for name in "kv")
    q, k = rotated(rms(q, gains[1]), cos, sin), rotated(rms(k, gains[2]), cos, sin)
    all_keys, all_values = keys.clone(), values.clone()
    all_keys[:, :, slots : slots + 1], all_values[:, :, slots : slots + 1] = k.to(dtype), v.to(dtype)
    seen = [t[:, :, : slots + 1].float().repeat_interleave(shared, 1) for t in (all_keys, all_values)]
    mixed = F.scaled_dot_product_attention(q, *seen, attn_mask=mask[..., : slots + 1], scale=0.3)
    if gate is not None:
        mixed = mixed * gate.sigmoid()
    expected = x + F.linear(mixed.flatten(1)[:, None], w["out"].float())

    boolean = (mask == 0).contiguous()
    near(stepper.attention(x, layer, (cos, sin), step.cache_of(keys, values), slots, mask), expected)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert torch.allclose(keys.float(), all_keys.float(), rtol=rounding, atol=1e-5)
    assert torch.allclose(values.float(), all_values.float(), rtol=rounding, atol=1e-5)
    new = [torch.empty(batch, kv_heads, 1, dim, dtype=dtype) for _ in range(2)]
    queries = stepper.queries(x, layer, (cos, sin), *new)
    parts = [torch.cat([old[:, :, :slots], one], 2) for old, one in zip((keys, values), new, strict=True)]
    near(stepper.attend(x, layer, queries, *parts, boolean[..., : slots + 1].contiguous()), expected)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (20, 35), (32, 64), (128, 128), (64, 200)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [2, 4])
def test_gated_delta_net(stepper: step.Stepper, key_dim: int, value_dim: int, dtype: torch.dtype, taps: int) -> None:
    batch, key_heads, value_heads = 2, 2, 4
    keys, columns = key_heads * key_dim, value_heads * value_dim
    channels = 2 * keys + columns
    w = weights(
        torch.float32, qkv=(channels, HIDDEN), z=(columns, HIDDEN), b=(value_heads, HIDDEN), a=(value_heads, HIDDEN),
        out=(HIDDEN, columns), conv=(channels, 1, taps),
    )  # fmt: skip
    before, inside, a_log, dt_bias = gain(HIDDEN), gain(value_dim), torch.randn(value_heads), torch.randn(value_heads)
    conv_bias = torch.randn(channels)
    layer = DeltaNet(
        *(matrix(w[name]) for name in ("qkv", "z", "b", "a", "out")), step.norm(before, EPSILON, plus_one=False),
        step.norm(inside, EPSILON, plus_one=False), w["conv"].data_ptr(), conv_bias.data_ptr(), a_log.data_ptr(),
        dt_bias.data_ptr(), key_heads, value_heads, key_dim, value_dim, taps,
    )  # fmt: skip
    window = torch.randn(batch, channels, taps).to(dtype)
    state, x = torch.randn(batch, value_heads, key_dim, value_dim), torch.randn(batch, 1, HIDDEN)

    y = rms(x, before)
    fresh = F.linear(y, w["qkv"]).mT
    seen = torch.cat([window.float(), fresh], -1)
    mixed = F.silu(F.conv1d(seen, w["conv"], conv_bias, groups=channels)[..., -1])
    q, k, v = mixed.split([keys, keys, columns], -1)
    q, k = (t.view(batch, key_heads, key_dim).repeat_interleave(value_heads // key_heads, 1) for t in (q, k))
    q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    v = v.view(batch, value_heads, value_dim)
    decay = (-a_log.exp() * F.softplus(F.linear(y, w["a"])[:, 0] + dt_bias)).exp()[..., None, None]
    beta = F.linear(y, w["b"])[:, 0].sigmoid()[..., None]
    after = state * decay
    after = after + k[..., None] * ((v - (after * k[..., None]).sum(-2)) * beta)[..., None, :]
    core_out = (after * q[..., None]).sum(-2) * key_dim**-0.5
    gated = rms(core_out, inside) * F.silu(F.linear(y, w["z"]).view(batch, value_heads, value_dim))
    expected = x + F.linear(gated.flatten(1)[:, None], w["out"])

    near(stepper.delta_net(x, layer, window, state), expected)
    near(state, after)
    assert torch.allclose(window.float(), seen[..., 1:].to(dtype).float(), rtol=0.01, atol=1e-5)
    assert torch.equal(window[..., :-1], seen[..., 1:-1].to(dtype))


def packed(rows: int, inputs: int, fmt: GroupedFormat) -> tuple[Tensor, Arranged]:
    """A weight as it is packed, [rows, inputs], and its parts."""
    parts = codec.encode(torch.randn(rows, inputs) * inputs**-0.5, fmt, "fast").parts
    return fmt.decode(parts, inputs), Arranged(fmt, (rows, inputs), tuple(parts.values()))


@pytest.mark.parametrize("tokens", [1, 3, 11])
def test_mlp_of_packed_and_plain_matrices(stepper: step.Stepper, tokens: int) -> None:
    gate, gate_parts = packed(72, 128, CodebookFormat(3, 32))
    up, up_parts = packed(72, 128, TrellisFormat(4, 64))
    down, bias, before = weights(torch.bfloat16, down=(128, 72))["down"], torch.randn(72).half(), gain(128) - 1
    layer = Mlp(
        step.packed_matrix(gate_parts, bias), step.packed_matrix(up_parts, None), matrix(down),
        step.norm(before, EPSILON, plus_one=True),
    )  # fmt: skip
    x = torch.randn(tokens, 1, 128)
    y = rms(x, before + 1)
    inner = F.silu(F.linear(y, gate, bias.float())) * F.linear(y, up)
    expected = x + F.linear(inner, down.float())
    assert stepper.mlp_(x, layer) is x
    near(x, expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("tokens", [1, 4])
def test_experts(stepper: step.Stepper, tokens: int, renormalize: bool, shared: bool) -> None:
    experts, k, inner, hidden = 7, 3, 64, 128
    (gate_up, first), (down, second) = (
        packed_stack(experts, 2 * inner, hidden, TrellisFormat(3, 128)),
        packed_stack(experts, hidden, inner, CodebookFormat(4, 64)),
    )  # fmt: skip
    w = weights(
        torch.bfloat16, router=(experts, hidden), gate=(40, hidden), up=(40, hidden), down=(hidden, 40), one=(1, hidden)
    )
    before = gain(hidden)
    norm = step.norm(before, EPSILON, plus_one=False)
    beside = Mlp(matrix(w["gate"]), matrix(w["up"]), matrix(w["down"]), norm) if shared else Mlp(before=norm)
    layer = Moe(
        matrix(w["router"]), matrix(w["one"]) if shared else Matrix(), beside, weight_of(first), weight_of(second),
        signs_of(128).data_ptr(), signs_of(64).data_ptr(), k, renormalize,
    )  # fmt: skip
    x = torch.randn(tokens, 1, hidden)
    y = rms(x, before)[:, 0]
    wide = {name: each.float() for name, each in w.items()}
    share, index = F.linear(y, wide["router"]).softmax(-1).topk(k, -1)
    share = share / share.sum(-1, keepdim=True) if renormalize else share
    expected = x[:, 0].clone()
    for t in range(tokens):
        for weight, e in zip(share[t], index[t], strict=True):
            gate, up = F.linear(y[t], gate_up[e]).chunk(2)
            expected[t] += weight * F.linear(F.silu(gate) * up, down[e])
    if shared:
        common = F.linear(F.silu(F.linear(y, wide["gate"])) * F.linear(y, wide["up"]), wide["down"])
        expected += F.linear(y, wide["one"]).sigmoid() * common
    near(stepper.mlp_(x, layer)[:, 0], expected)


def packed_stack(experts: int, rows: int, inputs: int, fmt: GroupedFormat) -> tuple[Tensor, Arranged]:
    each = [packed(rows, inputs, fmt) for _ in range(experts)]
    parts = [torch.stack(part) for part in zip(*(one.tensors for _, one in each), strict=True)]
    return torch.stack([weight for weight, _ in each]), Arranged(each[0][1].fmt, (experts, rows, inputs), tuple(parts))


def test_experts_of_logits_that_are_no_numbers_are_still_experts(stepper: step.Stepper) -> None:
    (_, first), (_, second) = (packed_stack(4, 128, inputs, CodebookFormat(3, inputs)) for inputs in (128, 64))
    router, before = torch.randn(4, 128), gain(128)
    layer = Moe(
        matrix(router), Matrix(), Mlp(before=step.norm(before, EPSILON, plus_one=False)), weight_of(first), weight_of(second),
        signs_of(128).data_ptr(), signs_of(64).data_ptr(), 2, True,
    )  # fmt: skip
    x = torch.full((2, 1, 128), torch.nan)
    assert bool(stepper.mlp_(x, layer).isnan().all())


@pytest.mark.parametrize("value", [-1e30, -88.0, -30.0, -1.0, 0.0, 1.0, 30.0, 88.0, 1e30])
def test_silu_of_any_size(stepper: step.Stepper, value: float) -> None:
    one, ones = torch.eye(HIDDEN), torch.ones(HIDDEN)
    gate = one * value
    layer = Mlp(matrix(gate), matrix(one), matrix(one), step.norm(ones, EPSILON, plus_one=False))
    x = torch.ones(1, 1, HIDDEN)
    y = rms(x, ones)
    found = stepper.mlp_(x.clone(), layer)
    assert torch.allclose(found, x + F.silu(y * value) * y, rtol=1e-6, atol=1e-6)
