"""The op that a fused layer of a serving engine is: needs no vLLM."""

from __future__ import annotations

import pytest
import torch

from kappaquant.engines.vllm import product
from kappaquant.formats import codec
from kappaquant.formats.codebook import FORMATS, Format
from kappaquant.kernels import dispatch as ops
from kappaquant.runtime.experts import KeptWeight
from kappaquant.runtime.packed import PackedWeight

WIDTH = 200  # no whole number of groups


def packed(fmt: Format, rows: int, seed: int) -> PackedWeight:
    weight = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)) / 10
    encoded = codec.encode(weight, fmt)
    made = PackedWeight(fmt, weight.shape, fmt.codebook, device="cpu")
    made.fill((), encoded.packed, encoded.norms)
    made.finish()
    return made


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


@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (7, WIDTH), (2, 3, WIDTH)])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_of_all_parts_one_below_the_other(shape: tuple[int, ...], biased: bool) -> None:
    x, bias = torch.randn(shape), torch.randn(40) if biased else None
    weight = torch.cat([p.tensor if isinstance(p, KeptWeight) else p.dequantize() for p in parts()])
    found = product.multiply(x, parts(), bias, "int8")
    assert found.shape == (*shape[:-1], 40)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_result_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x = torch.randn(4, WIDTH).to(dtype)
    some = [packed(FORMATS["tq4g128"], 8, 0), kept(4, dtype)]
    found = product.multiply(x, some, None, "int8")
    assert found.dtype == dtype
    weight = torch.cat([some[0].dequantize(), some[1].tensor.float()])
    torch.testing.assert_close(found.float(), x.float() @ weight.t(), rtol=2e-2, atol=2e-2)


def test_one_rotation_for_each_group_size(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    rotate = ops.rotate
    monkeypatch.setattr(ops, "rotate", lambda x, group: groups.append(group) or rotate(x, group))
    product.multiply(torch.randn(2, WIDTH), parts(), None, "int8")
    assert groups == [128, 32]


def test_the_op_is_one_that_compilers_accept() -> None:
    some = parts()[:2]
    tensors = [some[0].tq_packed, some[0].tq_norms, some[0].codebook, some[1].tensor]
    layout = [product._PACKED, 24, 3, 128, product._KEPT, 5, 0, 0]
    torch.library.opcheck(product._fused_linear, (torch.randn(3, WIDTH), tensors, layout, [], torch.randn(29), "int8"))


def test_compiled_for_any_number_of_tokens() -> None:
    some = torch.nn.ModuleList(parts())
    compiled = torch.compile(
        lambda x: product.multiply(x, some, None, "int8"), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for tokens in (2, 5):
        x = torch.randn(tokens, WIDTH)
        torch.testing.assert_close(compiled(x), product.multiply(x, some, None, "int8"))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 40, 3000])
def test_on_a_gpu_in_a_graph(tokens: int) -> None:
    some = torch.nn.ModuleList(parts()).to("cuda")
    some[1].tensor = some[1].tensor.half()
    x = torch.randn(tokens, WIDTH, device="cuda").half()
    weight = torch.cat([p.tensor.float() if isinstance(p, KeptWeight) else p.dequantize() for p in parts()])
    expected = x.float().cpu() @ weight.t()
    product.multiply(x, some, None, "bf16")  # compiles what a graph cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = product.multiply(x, some, None, "bf16")
    graph.replay()
    assert (found.float().cpu() - expected).norm() < 0.01 * expected.norm()
