"""The op that a fused layer of a serving engine is: needs no vLLM."""

from __future__ import annotations

from collections.abc import Iterable

import preparations
import pytest
import torch
from packed_weights import held

from kappaquant.formats.codebook import FORMATS, CodebookFormat
from kappaquant.kernels import dispatch
from kappaquant.runtime.experts import KeptWeight
from kappaquant.runtime.packed import PackedWeight

WIDTH = 200  # no whole number of groups


def packed(fmt: CodebookFormat, rows: int, seed: int) -> PackedWeight:
    return held(torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)) / 10, fmt)[0]


def kept(rows: int, dtype: torch.dtype = torch.float32) -> KeptWeight:
    made = KeptWeight((rows, WIDTH), dtype, "cpu")
    made.tensor.copy_(torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(9)) / 10)
    return made


def parts() -> list[PackedWeight | KeptWeight]:
    return [
        packed(FORMATS["tq3g128"], 24, 0),
        kept(5),
        packed(FORMATS["tq8g32"], 8, 1),
        packed(FORMATS["tq2g128"], 3, 2),
    ]


def plain(part: PackedWeight | KeptWeight) -> torch.Tensor:
    if isinstance(part, KeptWeight):
        return part.tensor
    return part.fmt.decode(part.kernel.restore(part.arranged), WIDTH)


def multiply(
    x: torch.Tensor, some: Iterable[PackedWeight | KeptWeight], bias: torch.Tensor | None, activations: str
) -> torch.Tensor:
    weights = [
        (dispatch.KEPT, [part.tensor], part.tensor.shape[0])
        if isinstance(part, KeptWeight)
        else (part.spec, part.tensors, part.shape[0])
        for part in some
    ]
    return dispatch.fused_linear(x, weights, bias, activations)


@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (7, WIDTH), (2, 3, WIDTH)])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_of_all_parts_one_below_the_other(shape: tuple[int, ...], biased: bool) -> None:
    x, bias = torch.randn(shape), torch.randn(40) if biased else None
    weight = torch.cat(list(map(plain, parts())))
    found = multiply(x, parts(), bias, "float32")
    assert found.shape == (*shape[:-1], 40)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_result_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x = torch.randn(4, WIDTH).to(dtype)
    some = [packed(FORMATS["tq4g128"], 8, 0), kept(4, dtype)]
    found = multiply(x, some, None, "float32")
    assert found.dtype == dtype
    weight = torch.cat([plain(some[0]), some[1].tensor.float()])
    torch.testing.assert_close(found.float(), x.float() @ weight.t(), rtol=2e-2, atol=2e-2)


def test_one_rotation_for_each_group_size(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = preparations.counted(monkeypatch)
    multiply(torch.randn(2, WIDTH), parts(), None, "float32")
    assert groups == [128, 32]


def test_the_op_is_one_that_compilers_accept() -> None:
    some = parts()[:2]
    specs = dispatch.SEPARATOR.join((some[0].spec, dispatch.KEPT))
    arguments = (
        torch.randn(3, WIDTH),
        [],
        [*some[0].tensors, some[1].tensor],
        specs,
        [24, 5],
        torch.randn(29),
        "float32",
    )
    torch.library.opcheck(torch.ops.kappaquant.linear, arguments)


def test_compiled_for_any_number_of_tokens() -> None:
    some = torch.nn.ModuleList(parts())
    compiled = torch.compile(
        lambda x: multiply(x, some, None, "float32"), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for tokens in (2, 5):
        x = torch.randn(tokens, WIDTH)
        torch.testing.assert_close(compiled(x), multiply(x, some, None, "float32"))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 40, 3000])
def test_on_a_gpu_in_a_graph(tokens: int) -> None:
    some = torch.nn.ModuleList(parts()).to("cuda")
    some[1].tensor = some[1].tensor.half()
    x = torch.randn(tokens, WIDTH, device="cuda").half()
    weight = torch.cat([plain(p).float() for p in parts()])
    expected = x.float().cpu() @ weight.t()
    multiply(x, some, None, "bf16")  # compiles what a graph cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = multiply(x, some, None, "bf16")
    graph.replay()
    assert (found.float().cpu() - expected).norm() < 0.01 * expected.norm()
