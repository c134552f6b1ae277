"""New kernels from this file alone: one that wins the dispatch with an order of its own, one that refuses with its reason."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import tiny_models
import torch
from preparations import PLAIN

import kappaquant
from kappaquant.errors import UnsupportedError
from kappaquant.formats.base import Format
from kappaquant.formats.codebook import NORMS_SUFFIX, PACKED_SUFFIX, CodebookFormat
from kappaquant.kernels import dispatch
from kappaquant.kernels.base import Arranged, Kernel, Use
from kappaquant.runtime.packed import PackedWeight


class Backwards(Kernel):
    """Keeps rows in reverse order, of 3-bit codebook formats only."""

    name = "backwards"
    uses: frozenset[Use] = frozenset({"linear"})

    def __init__(self) -> None:
        self.products = 0

    def refusal(self, fmt: Format, parts: Mapping[str, torch.Tensor]) -> str | None:
        if not isinstance(fmt, CodebookFormat) or fmt.bits != 3:
            return f"takes 3 bits, not {fmt.id}"
        return None

    def arrange(self, fmt: Format, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"reversed_scales": parts[NORMS_SUFFIX].flip(0), "reversed_codes": parts[PACKED_SUFFIX].flip(0)}

    def tensor_count(self, fmt: Format) -> int:
        return 2

    def restore(self, weight: Arranged) -> dict[str, torch.Tensor]:
        scales, codes = weight.tensors
        return {PACKED_SUFFIX: codes.flip(0), NORMS_SUFFIX: scales.flip(0)}

    def input_kind(
        self, fmt: Format, tokens: int, rows: int, activations: str, device: torch.device
    ) -> Hashable | None:
        return fmt.rotation

    def prepare(self, x: torch.Tensor, fmt: Format, kind: Hashable) -> list[torch.Tensor]:
        return [fmt.rotate(x)]

    def linear(
        self,
        x: torch.Tensor,
        prepared: Sequence[torch.Tensor],
        kind: Hashable | None,
        weight: Arranged,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        self.products += 1
        decoded = weight.fmt.decode_rotated(self.restore(weight), weight.shape[-1])
        y = (prepared[0] @ decoded.T).to(x.dtype)
        return y if bias is None else y + bias


class Idle(Backwards):
    """Refuses everything."""

    name = "idle"

    def refusal(self, fmt: Format, parts: Mapping[str, torch.Tensor]) -> str | None:
        return "only works on Sundays"


@pytest.fixture
def kernel() -> Iterator[Backwards]:
    """Both kernels are there; the one that refuses is asked first."""
    winner = Backwards()
    dispatch.register(winner)
    dispatch.register(Idle())
    yield winner
    for name in ("backwards", "idle"):
        dispatch.unregister(name)


def test_a_loaded_model_multiplies_by_it(kernel: Backwards, tmp_path: Path) -> None:
    source = kappaquant.open_source(tiny_models.save_tiny("qwen3_moe", tmp_path / "source", experts="fused"))
    plan = kappaquant.make_plan(source.tensors, source.config, overrides=[("*.o_proj.weight", 4)])
    kappaquant.quantize(source, tmp_path / "out", plan)
    model, _ = kappaquant.load(tmp_path / "out", dtype=torch.float32, activations="float32")
    served = {name: m.kernel.name for name, m in model.named_modules() if isinstance(m, PackedWeight)}
    assert served["model.layers.0.self_attn.q_proj.weight"] == "backwards"
    assert served["model.layers.0.self_attn.o_proj.weight"] == PLAIN  # refused: 4 bits
    assert {n for name, n in served.items() if "experts" in name} == {PLAIN}  # it serves no experts
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(input_ids=ids).logits
    assert kernel.products == sum(name == "backwards" for name in served.values())
    for name in ("backwards", "idle"):
        dispatch.unregister(name)
    plain, _ = kappaquant.load(tmp_path / "out", dtype=torch.float32, activations="float32")
    with torch.no_grad():
        torch.testing.assert_close(found, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    dispatch.register(kernel)
    dispatch.register(Idle())


def test_a_weight_that_is_moved_asks_again(kernel: Backwards) -> None:
    fmt = CodebookFormat(3, 32)
    encoded = fmt.encode(torch.randn(10, 64))
    weight = PackedWeight(fmt, (10, 64), "cpu")
    weight.fill((), encoded.parts)
    weight.finish()
    assert set(weight.state_dict()) == {"reversed_scales", "reversed_codes"}
    weight.serve("rows")  # which it does not
    assert weight.kernel.name == PLAIN
    assert set(weight.state_dict()) == {"tq_packed", "tq_norms"}
    assert torch.equal(weight.dequantize(), fmt.decode(encoded.parts, 64))


def test_the_reason_of_one_that_refuses_is_told(kernel: Backwards) -> None:
    fmt = CodebookFormat(4, 32)
    parts = fmt.encode(torch.randn(4, 64)).parts
    with pytest.raises(UnsupportedError, match=r"no kernel for tq4g32 \(linear\): idle: only works on Sundays"):
        dispatch.choose(fmt, parts, ["linear"], kernel="idle")
    with pytest.raises(UnsupportedError, match="backwards: takes 3 bits, not tq4g32"):
        dispatch.choose(fmt, parts, ["linear"], kernel="backwards")
    assert dispatch.choose(fmt, parts, ["linear"])[0].name == PLAIN
