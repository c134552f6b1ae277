"""Kernels of routed and shared experts: against decoded weights in float64, on every width."""

from __future__ import annotations

import pytest
import torch
from gpu_products import INT8_NAMES, NAMES, gpu, named, random
from gpu_products import prepared as made
from nvrtc_here import ARCHITECTURES, needs_compiler

from kappaquant.formats.codebook import CodebookFormat
from kappaquant.kernels.base import Arranged
from kappaquant.kernels.cuda import experts, inputs, nvrtc, tensor_cores
from kappaquant.kernels.cuda.tiled import Tiled

EXPERTS, TOP_K = 7, 3
NO_EXPERTS = (-1, EXPERTS, 2**31 - 1, -(2**31), 2**32, 2**32 + 1, 2**63 - 1)


@needs_compiler
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile(arch: str) -> None:
    for instance in (
        "gate_up<3, 0, 0, 128, false, 8>", "gate_up<6, 4, 8, 64, true, 8>", "gate_up<2, 5, 3, 256, false, 8>",
        "gate_up<19, 4, 20, 256, false, 8>", "gate_up<18, 0, 0, 32, true, 8>", "down<20, 19, 64, false>",
        "down<4, 0, 128, false>", "down<3, 5, 32, false>", "down<7, 6, 128, true>",
    ):  # fmt: skip
        assert nvrtc.compiled("experts.cu", instance, arch)[0].startswith(b"\x7fELF")


def test_refusals_say_why() -> None:
    weights = [tensor_cores.Weight(None, CodebookFormat(b, g), 1, 1) for b, g in ((3, 128), (6, 128), (4, 64))]  # type: ignore[arg-type]
    assert experts.refusal(weights[:1], False) is None
    assert experts.refusal(weights[:2], True) is None
    assert "int8 inputs serve 2, 3, 4, 5 bits, not tq6g128" in str(experts.refusal(weights[:2], False))
    assert "groups of 64, 128" in str(experts.refusal([weights[0], weights[2]], False))


def prepared(name: str, *shape: int, seed: int, group: int = 128) -> tuple[tensor_cores.Weight, torch.Tensor]:
    return made(named(name, group), *shape, seed=seed, scale=1 / 8)


@gpu
@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("half", [False, True], ids=["int8", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_experts(name: str, half: bool, group: int) -> None:
    if not half and name not in INT8_NAMES:
        pytest.skip("int8 inputs serve 2 to 5 bits")
    hidden, inner = 300, 160
    other = {"k4": "k3", "k3": "t3", "t4": "t3"}.get(name, "k4")
    gate_up, gate_up_plain = prepared(name, EXPERTS, 2 * inner, hidden, seed=1, group=group)
    down, down_plain = prepared(other, EXPERTS, hidden, inner, seed=2, group=group)
    shared = [prepared(each, inner, hidden, seed=i, group=group) for i, each in enumerate((other, name))]
    shared_down, shared_down_plain = prepared(name, hidden, inner, seed=3, group=group)
    for tokens in (1, 2, 5, 17):
        x = random(tokens, hidden, seed=tokens).cuda().bfloat16()
        index = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).cuda()
        weights = torch.rand(tokens, TOP_K, device="cuda").bfloat16()
        gate = random(tokens, seed=9).cuda().bfloat16()
        residual = random(tokens, hidden, seed=8).cuda().bfloat16()

        rotated, _ = inputs.rotate(x, gate_up.fmt, half)
        inside = experts.gate_up(rotated, index, gate_up, (shared[0][0], shared[1][0]), torch.bfloat16)
        rows = x.double().repeat_interleave(TOP_K, 0)
        expected = torch.einsum("sh,sih->si", rows, gate_up_plain[index.flatten()])
        of_shared = x.double() @ torch.cat([plain for _, plain in shared]).T
        close(inside, torch.cat([expected, of_shared]), half)

        first, second = inside.chunk(2, dim=-1)
        h = torch.nn.functional.silu(first) * second
        again, _ = inputs.rotate(first, down.fmt, half, gate_of=second)
        y = experts.down(again, index, weights, down, shared_down, gate, residual)
        routed = torch.einsum("si,shi->sh", h[: len(rows)].double(), down_plain[index.flatten()])
        routed = (routed.view(tokens, TOP_K, hidden) * weights.double()[..., None]).sum(1)
        beside = h[len(rows) :].double() @ shared_down_plain.T * torch.sigmoid(gate.double())[:, None]
        close(y - residual, routed + beside, half, 2)
        assert torch.equal(y, experts.down(again, index, weights, down, shared_down, gate, residual))

        alone = experts.forward(rotated, index, weights, gate_up, down, weights.dtype)
        close(alone, routed, half, 2)


def close(y: torch.Tensor, expected: torch.Tensor, half: bool, layers: int = 1) -> None:
    assert float((y.double() - expected).norm() / expected.norm()) < layers * (5e-3 if half else 0.02)


def block(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Arranged]]:
    """Inputs, experts and weights of tokens, and both projections of the experts."""
    hidden, inner = 256, 128
    arranged = []
    for name, n, k in (("k3", 2 * inner, hidden), ("t4", hidden, inner)):
        weight, _ = prepared(name, EXPERTS, n, k, seed=n)
        arranged.append(Arranged(weight.fmt, (EXPERTS, n, k), (weight.tiled.codes, weight.tiled.norms)))
    index = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).cuda()
    weights = torch.rand(tokens, TOP_K, device="cuda").bfloat16()
    return random(tokens, hidden, seed=3).cuda().bfloat16(), index, weights, arranged


@gpu
@pytest.mark.parametrize("activations", ["int8", "bf16"])
@pytest.mark.parametrize("tokens", [1, 5, 200, 700])  # the last two are sorted
def test_ids_that_are_no_expert_count_nothing(tokens: int, activations: str) -> None:
    x, index, weights, arranged = block(tokens)
    nobody = torch.arange(tokens * TOP_K, device="cuda").view(tokens, TOP_K) % 4 == 1
    ids = torch.tensor(NO_EXPERTS, device="cuda")[torch.arange(tokens * TOP_K, device="cuda") % len(NO_EXPERTS)]
    hostile = torch.where(nobody, ids.view(tokens, TOP_K), index)
    expected = Tiled().experts(x, index, weights.masked_fill(nobody, 0), *arranged, activations)
    spoilt = weights.masked_fill(nobody, torch.nan)
    assert torch.equal(Tiled().experts(x, hostile, spoilt, *arranged, activations), expected)
    none = Tiled().experts(x, torch.full_like(index, 2**31 - 1), spoilt, *arranged, activations)
    assert torch.equal(none, torch.zeros_like(x))


@gpu
@pytest.mark.parametrize("activations", ["int8", "bf16"])
@pytest.mark.parametrize("tokens", [5, 200])
def test_a_token_that_is_no_number_spoils_no_other(tokens: int, activations: str) -> None:
    x, index, weights, arranged = block(tokens)
    expected = Tiled().experts(x, index, weights, *arranged, activations)
    x[1], x[3, 7], weights[4] = torch.nan, torch.inf, torch.nan
    y = Tiled().experts(x, index, weights, *arranged, activations)
    others = [t for t in range(tokens) if t not in (1, 3, 4)]
    assert torch.equal(y[others], expected[others])
    assert y[4].isnan().all()


@gpu
@pytest.mark.parametrize("tokens", [5, 200])
def test_weights_need_not_be_in_the_dtype_of_the_tokens(tokens: int) -> None:
    x, index, weights, arranged = block(tokens)
    expected = Tiled().experts(x, index, weights, *arranged, "bf16")
    wide = Tiled().experts(x, index, weights.float(), *arranged, "bf16")
    assert wide.dtype == torch.bfloat16
    assert torch.equal(wide, expected)


@gpu
@pytest.mark.parametrize("tokens", [1, 5, 100, 400])  # the last is sorted
@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("name", NAMES)
def test_grouped_linear(name: str, group: int, tokens: int) -> None:
    weight, plain = prepared(name, EXPERTS, 200, 300, seed=4, group=group)
    arranged = Arranged(weight.fmt, (EXPERTS, 200, 300), (weight.tiled.codes, weight.tiled.norms))
    x = random(tokens, 300, seed=3).cuda().bfloat16()
    index = torch.randint(EXPERTS, (tokens, TOP_K), device="cuda")
    nobody = torch.arange(tokens * TOP_K, device="cuda").view(tokens, TOP_K) % 4 == 1
    ids = torch.tensor(NO_EXPERTS, device="cuda")[torch.arange(tokens * TOP_K, device="cuda") % len(NO_EXPERTS)]
    hostile = torch.where(nobody, ids.view(tokens, TOP_K), index)
    y = Tiled().grouped_linear(x, hostile, arranged)
    expected = torch.einsum("th,tkih->tki", x.double(), plain[index]).masked_fill(nobody[..., None], 0)
    close(y, expected, True)
    assert not y[nobody].any()


@gpu
def test_no_tokens_give_no_rows() -> None:
    gate_up, _ = prepared("k3", EXPERTS, 64, 128, seed=1)
    down, _ = prepared("k3", EXPERTS, 128, 32, seed=2)
    rotated, _ = inputs.rotate(torch.empty(0, 128, device="cuda"), gate_up.fmt, False)
    index = torch.empty(0, TOP_K, dtype=torch.int64, device="cuda")
    assert experts.forward(rotated, index, index.float(), gate_up, down, torch.float32).shape == (0, 128)
