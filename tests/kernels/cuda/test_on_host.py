"""Products on a CPU, where kernels' sources run as they are (cuda_on_host.py): inputs, linear layers, experts, of few tokens and of many.

Tests with a GPU say more; these are what machines without one can find out, on the same formats, groups and odd shapes.
"""

from __future__ import annotations

from collections.abc import Iterator

import cuda_on_host
import pytest
import torch
from gpu_products import INT8_NAMES, NAMES, codes, error, int8_values, named, random

from kappaquant.errors import UnsupportedError
from kappaquant.formats import codec
from kappaquant.formats.codebook import GroupedFormat
from kappaquant.formats.signs import GROUP_SIZES
from kappaquant.kernels.cuda import (
    experts,
    gemm,
    inputs,
    int8_gemm,
    launches,
    nvrtc,
    sorted_experts,
    tensor_cores,
    tiles,
)
from kappaquant.kernels.cuda.tensor_cores import Launch, Weight

pytestmark = cuda_on_host.needs_host_compiler
EXPERTS = 3


def every_group(names: list[str]) -> list[object]:
    """Each name with each group, of which one a name is not slow."""
    return [
        pytest.param(name, group, marks=() if (i + at) % 4 == 0 else pytest.mark.slow, id=f"{name}g{group}")
        for i, name in enumerate(names)
        for at, group in enumerate(GROUP_SIZES)
    ]


@pytest.fixture(scope="module", autouse=True)
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc, "kernel", cuda_on_host.kernels(tmp_path_factory.mktemp("kernels")))
        patch.setattr(inputs, "_check_input", lambda *_: None)
        patch.setattr(gemm, "refusal", lambda _: None)
        patch.setattr(gemm.gpu, "multiprocessors", lambda _: 2)
        yield


def product(x: inputs.Input, fmt: GroupedFormat, *shape: int) -> torch.Tensor:
    """Of the integers that kernels multiply, by what int8 tables hold, with the weight of ``codes``."""
    packed, norms = codes(fmt, *shape)
    rows = int8_values(fmt)[codec.indices(packed, fmt).long()] * norms.double().repeat_interleave(fmt.group_size, -1)
    values = x.values.double() * x.scales[:, : len(x.values)].T.double().repeat_interleave(fmt.group_size, 1)
    return values[:, : rows.shape[-1]] @ rows.mT


def weight(fmt: GroupedFormat, *shape: int, seed: int = 0) -> tuple[Weight, torch.Tensor]:
    """(tiles, decoded in float64)"""
    packed, norms = codes(fmt, *shape, seed=seed)
    decoded = codec.decode(packed, norms, fmt, shape[-1]).double()
    return Weight(tiles.tile(packed, norms, fmt), fmt, shape[-2], shape[-1]), decoded


@pytest.mark.parametrize(("name", "group"), every_group(INT8_NAMES))
def test_int8_products(name: str, group: int) -> None:
    """Units read by registers or staged, one block of tokens or two, one tile of rows or several: the same numbers."""
    fmt = named(name, group)
    for n, k in ((45, 3 * group - 5), (1, group)):
        held, decoded = weight(fmt, n, k)
        for m in (1, 9):
            x, bias = random(m, k, seed=m).bfloat16(), random(n, seed=7)
            rotated, _ = inputs.rotate(x, fmt, False)
            expected = product(rotated, fmt, n, k) + bias
            usual = float((x.double().norm(dim=1, keepdim=True) * decoded.norm(dim=1)).norm()) / k**0.5
            for launch in (Launch(1, 1, 4, 16), Launch(1, 2, 4, 16, 3), Launch(2, 1, 4, 16, 3)):
                (y,) = tensor_cores.linear(rotated, [held], torch.float32, [bias], launch)
                assert error(y - bias, x, decoded) < (0.013 if m * n > 100 else 0.04), (n, k, m, launch)
                assert float((y - expected).norm()) < 1e-4 * usual, (n, k, m, launch)


@pytest.mark.parametrize(("name", "group"), every_group(["k2", "k6", "t4", "k3", "k5", "k8", "t3", "k4"]))
def test_float16_products(name: str, group: int) -> None:
    fmt = named(name, group)
    held, decoded = weight(fmt, 45, 3 * group - 5)
    x = random(9, 3 * group - 5).bfloat16()
    (y,) = tensor_cores.linear(inputs.rotate(x, fmt, True)[0], [held], torch.float32, launch=Launch(2, 1, 4, 16))
    assert error(y, x, decoded) < 1e-3


# of blocks that share no input axis, which clusters do
WIDE = (
    gemm.Launch(16, 1, 1, 4, 4), gemm.Launch(64, 1, 1, 3, 2), gemm.Launch(128, 1, 1, 4, 1), gemm.Launch(256, 2, 1, 3, 1), gemm.Launch(8, 1, 1, 4, 4),
)  # fmt: skip
INT8_WIDE = (int8_gemm.Launch(32, 1, 1, 4, 3), int8_gemm.Launch(64, 1, 1, 4, 2), int8_gemm.Launch(128, 1, 1, 3, 2))


@pytest.mark.parametrize(("name", "group"), every_group(NAMES))
def test_products_of_many_tokens(name: str, group: int) -> None:
    fmt = named(name, group)
    n, k = 134, 640 + group - 5
    (held, decoded), x, at = weight(fmt, n, k), random(19, k, seed=1).bfloat16(), fmt.bits + GROUP_SIZES.index(group)
    wide = WIDE[at % len(WIDE)]
    (y,) = gemm.linear(inputs.rotate_tokens(x, fmt, True)[0], [held], torch.float32, launch=wide)
    assert error(y, x, decoded) < 1e-3, wide
    if name in INT8_NAMES:
        launch = INT8_WIDE[at % len(INT8_WIDE)]
        (y,) = gemm.linear(inputs.rotate_tokens(x, fmt, False)[0], [held], torch.float32, launch=launch)
        expected = product(inputs.rotate(x, fmt, False)[0], fmt, n, k)
        assert float((y - expected).norm() / expected.norm()) < 1e-5, launch


@pytest.mark.parametrize(
    ("name", "group", "launch"),
    [("t3", 128, INT8_WIDE[0]), ("k4", 256, INT8_WIDE[1]), ("t4", 64, WIDE[0]), ("k6", 32, WIDE[1])],
    ids=str,
)
def test_products_of_experts_with_many_tokens(name: str, group: int, launch: gemm.Launch | int8_gemm.Launch) -> None:
    """Few of an item's tokens take half its time, by another product."""
    fmt, k, slots = named(name, group), 384 + group - 3, routes(60)
    held, decoded = weight(fmt, EXPERTS, 134, k)
    x = random(60, k).bfloat16()
    positions, work, places = items(slots, launch.tokens)
    rotated, _ = inputs.rotate_tokens(x, fmt, launch.half, positions=positions, blocks=places // 8)
    (y,) = gemm.linear(rotated, [held], torch.float32, launch=launch, items=work)
    for expert in range(EXPERTS):
        mine = slots.flatten() == expert
        most = 1e-3 if launch.half else 0.013
        assert error(y[mine], x.repeat_interleave(2, 0)[mine], decoded[expert]) < most


def test_outputs_of_different_formats_share_an_input() -> None:
    made = [weight(named(name), n, 640, seed=n) for name, n in (("k3", 70), ("t4", 32), ("k5", 1), ("t2", 40))]
    x = random(5, 640).bfloat16()
    rotated, _ = inputs.rotate(x, named("k3"), False)
    launch = Launch(1, 1, 4, 16, 3)
    outs = tensor_cores.linear(rotated, [held for held, _ in made], torch.bfloat16, launch=launch)
    for y, (_, decoded) in zip(outs, made, strict=True):
        assert error(y, x, decoded) < 0.02


def items(index: torch.Tensor, each: int) -> tuple[torch.Tensor, launches.Items, int]:
    """(positions, work, places) as sort_experts.cu makes them, one item more than there is work for."""
    positions = torch.full(index.shape, -1, dtype=torch.int32)
    work, rows_of, at = [], [], 0
    for expert in range(EXPERTS):
        slots = (index.flatten() == expert).nonzero()[:, 0].tolist()
        for i, slot in enumerate(slots):
            positions.view(-1)[slot] = at + i
        work += [[expert, at + i, min(each, len(slots) - i), 0] for i in range(0, len(slots), each)]
        filled = -(-len(slots) // 8) * 8
        rows_of += [*slots, *[-1] * (filled - len(slots))]
        at += filled
    table = torch.tensor([*work, [0, 0, 0, 0]], dtype=torch.int32)
    return positions, launches.Items(table, torch.tensor(rows_of, dtype=torch.int32), index.numel()), at


@pytest.mark.parametrize("name", ["k3", "t2", "t3", "k4"])
def test_no_token_of_an_expert_depends_on_how_many_its_item_has(name: str) -> None:
    """An item of up to 8 takes half the products; where a slot goes among its expert's changes from run to run."""
    fmt, launch, k = named(name), Launch(2, 1, 4, 16), 640
    held, _ = weight(fmt, EXPERTS, 70, k)
    x, index = random(19, k, seed=3).bfloat16(), torch.zeros(19, 1, dtype=torch.int64)
    positions, work, places = items(index, launch.tokens)
    assert [int(count) for count in work.work[:, 2]] == [16, 3, 0]
    both = []
    for order in (positions, positions.flip(0)):
        rotated, _ = inputs.rotate(x, fmt, False, positions=order.contiguous(), places=places)
        rows_of = torch.full_like(work.rows_of, -1)
        rows_of[order.flatten().long()] = torch.arange(19, dtype=torch.int32)
        given = launches.Items(work.work, rows_of, work.rows)
        both += tensor_cores.linear(rotated, [held], torch.float32, launch=launch, items=given)
    assert torch.equal(*both)


@pytest.mark.parametrize("launch", [Launch(1, 4, 4, 16), Launch(2, 1, 4, 16), Launch(2, 4, 4, 16, 3)], ids=str)
@pytest.mark.parametrize(("name", "group"), [("t3", 128), ("k4", 64), ("t4", 256), ("k3", 32)])
def test_products_of_experts(name: str, group: int, launch: Launch) -> None:
    """Each copy of a token goes where its expert's are; one whose expert is none goes nowhere."""
    fmt, k = named(name, group), 1024 + group - 3
    held, decoded = weight(fmt, EXPERTS, 70, k)
    x, index = (
        random(21, k).bfloat16(),
        torch.rand(21, EXPERTS, generator=torch.Generator().manual_seed(1)).topk(2).indices,
    )
    index[::2, 0] = 1  # crowds one
    index[4, 1] = -1
    positions, work, places = items(index, launch.tokens)
    rotated, _ = inputs.rotate(x, fmt, False, positions=positions, places=places)
    (y,) = tensor_cores.linear(rotated, [held], torch.float32, launch=launch, items=work)
    with pytest.raises(UnsupportedError, match="at most 2 token_tiles"):
        tensor_cores.linear(rotated, [held], torch.float32, launch=Launch(4, 2, 4, 0), items=work)
    there = index.flatten() >= 0
    for expert in range(EXPERTS):
        mine = index.flatten() == expert
        assert error(y[mine], x.repeat_interleave(2, 0)[mine], decoded[expert]) < 0.013
    assert int(there.sum()) == 41


@pytest.mark.parametrize("half", [False, True], ids=["int8", "float16"])
def test_copies_are_what_a_token_becomes(half: bool) -> None:
    fmt, x = named("k3", 64), random(5, 150).bfloat16()
    with pytest.raises(UnsupportedError, match="positions and places go together"):
        inputs.rotate(x, fmt, half, places=24)
    plain, _ = inputs.rotate(x, fmt, half)
    positions = torch.tensor([[3, 17], [-1, 0], [8, 9], [16, -1], [1, 2]], dtype=torch.int32)
    copied, _ = inputs.rotate(x, fmt, half, positions=positions, places=24)
    for token, row in ((token, row) for token, rows in enumerate(positions.tolist()) for row in rows if row >= 0):
        assert torch.equal(copied.values[row], plain.values[token])
        assert torch.equal(copied.scales[:, row], plain.scales[:, token])
        assert half or torch.equal(copied.offsets[:, row], plain.offsets[:, token])


@pytest.mark.parametrize(
    ("first", "second", "group", "half", "tokens"),
    [("t3", "t4", 128, False, 9), ("k3", "k4", 64, False, 70), ("k4", "t3", 256, True, 9), ("k6", "k8", 32, True, 40)],
)
def test_sorted_experts(
    first: str, second: str, group: int, half: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on cards without Hopper's products: sorted by one thread block, multiplied by up to 16 tokens at a time."""
    monkeypatch.setattr(sorted_experts, "refusal", lambda *_: None)
    monkeypatch.setattr(gemm, "refusal", lambda _: "not Hopper")
    hidden, inner = 300, 70
    gate_up, plain_gate_up = weight(named(first, group), EXPERTS, 2 * inner, hidden)
    down, plain_down = weight(named(second, group), EXPERTS, hidden, inner, seed=1)
    x, index, weights = random(tokens, hidden).bfloat16() / 16, routes(tokens), random(tokens, 2, seed=2).abs()
    y = sorted_experts.forward(x, index, weights, gate_up, down, half)
    expected = through_experts(x, index, weights, plain_gate_up, plain_down)
    assert float((y - expected).norm() / expected.norm()) < (6e-3 if half else 0.03)


@pytest.mark.parametrize(
    ("first", "second", "group", "half"),
    [("t3", "t4", 128, False), ("k3", "k4", 64, False), ("k4", "t3", 256, True), ("k6", "k8", 32, True)],
)
def test_experts_slot_by_slot(first: str, second: str, group: int, half: bool) -> None:
    hidden, inner, tokens = 300, 70, 3
    gate_up, plain_gate_up = weight(named(first, group), EXPERTS, 2 * inner, hidden)
    down, plain_down = weight(named(second, group), EXPERTS, hidden, inner, seed=1)
    x, index, weights = random(tokens, hidden).bfloat16() / 16, routes(tokens), random(tokens, 2, seed=2).abs()
    y = experts.forward(inputs.rotate(x, gate_up.fmt, half)[0], index, weights, gate_up, down, torch.float32)
    expected = through_experts(x, index, weights, plain_gate_up, plain_down)
    assert float((y - expected).norm() / expected.norm()) < (5e-3 if half else 0.03)


def routes(tokens: int) -> torch.Tensor:
    """Two experts of each token, one of which gets half of them; a slot has none."""
    index = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(1)).topk(2).indices
    index[::2] = torch.tensor([1, 2])
    index[1, 1] = -1
    return index


def through_experts(
    x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Of decoded weights, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, choices in enumerate(index.tolist()):
        for choice, expert in enumerate(choices):
            if expert >= 0:
                gate, up = (gate_up[expert] @ x[token].double()).chunk(2)
                out[token] += weights[token, choice] * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    return out
