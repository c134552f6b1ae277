"""Which trellis code the formats t2, t3, t4 are: candidates by squared error on Gaussian weights, and with error feedback on real ones.

Candidates differ in states, in the ring of path bits (a part of a group or all of it), or lie along the rows of a single input, from
state 0 on, where feedback goes on input by input. Levels are trained for each. With --text the small model with real weights
(benchmarks.real_weights) is calibrated on the first half of a text by each, as quantize --calibration does it, and its divergence measured on the second;
with --layer as well, it is only what matrices of that layer lose under H.

python -m benchmarks.trellis_layouts                                              # Gaussian weights: minutes on one core
python -m benchmarks.trellis_layouts --text wikitext2_test.txt --layer 10 --bits 3       # likewise
python -m benchmarks.trellis_layouts --text wikitext2_test.txt --device cuda:0 [--layouts t ring32] [--bits 3]
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor

import kappaquant
from benchmarks.environment import environment, save
from benchmarks.real_measure import GROUP, Bench
from benchmarks.real_weights import default_folder, prepared
from kappaquant.formats import codec, viterbi
from kappaquant.formats.codebook import CodebookFormat, GroupedFormat, float32, symmetric
from kappaquant.formats.registry import register
from kappaquant.formats.search import Rounding
from kappaquant.formats.trellis import TRELLIS, Trellis, TrellisFormat
from kappaquant.quantizing.rounding import feedback, rings

GROUP_OF_GAUSSIANS = 128
SEGMENT = 128  # rows that a path goes down
SEEN, MOST_INPUTS = 8, 576  # windows of a text, and inputs of a matrix, for what one layer loses
GROUPS, ROUNDS = 1024, 40  # to train levels with
FEW = {4: Trellis((1,), (0, 2)), 8: Trellis((2,), (0, 1, 3)), 16: Trellis((2,), (0, 1, 4)), 64: TRELLIS}


@dataclass(frozen=True)
class Layout:
    """A candidate.

    Attributes:
        states: of its trellis.
        ring: path bits of a ring, at most those of a group; 0 where paths go down the rows.
    """

    states: int
    ring: int

    @property
    def code(self) -> Trellis:
        return FEW[self.states]


WHOLE = 256  # a ring of the group, whatever its size
LAYOUTS = {
    "t": Layout(64, WHOLE), "16 states": Layout(16, WHOLE), "8 states": Layout(8, WHOLE), "4 states": Layout(4, WHOLE),
    "ring32": Layout(64, 32), "ring32, 16 states": Layout(16, 32), "ring32, 8 states": Layout(8, 32),
    "rows": Layout(64, 0), "rows, 4 states": Layout(4, 0),
}  # fmt: skip


class Candidate(TrellisFormat):
    """A trellis format in another layout, to be measured and not to be stored: its bytes hold whole indices of levels."""

    def __init__(self, bits: int, group_size: int, layout: Layout, levels: tuple[float, ...] | None = None) -> None:
        super().__init__(bits, group_size, levels or trained(bits, group_size, layout))
        self.layout = layout
        self.id = f"x{bits}g{group_size}s{layout.states}r{layout.ring}"

    @property
    def key(self) -> str:
        return self.id

    @property
    def bytes_per_group(self) -> int:
        return self.group_size * (self.bits + 1) // 8

    def variant(self, codebook: tuple[float, ...], norms: str) -> Candidate:
        return Candidate(self.bits, self.group_size, self.layout, codebook)

    def __reduce__(self) -> tuple[type[Candidate], tuple[Any, ...]]:
        return Candidate, (self.bits, self.group_size, self.layout, self.codebook)

    def pack_block(self, indices: Tensor) -> Tensor:
        return codec.pack_block(indices, self.bits + 1)

    def unpack_block(self, packed: Tensor) -> Tensor:
        return codec.unpack_block(packed, self.bits + 1)

    def rounding(self, count: int, device: torch.device) -> Rounding:
        return CandidateRounding(self.group_size, count, device, self.codebook, self.layout)


class CandidateRounding(viterbi.RingRounding):
    """As the package's, ring by ring; data-free codes of paths down the rows are those of whole rings, which lose about as much."""

    def __init__(
        self, group_size: int, count: int, device: torch.device, levels: tuple[float, ...], layout: Layout
    ) -> None:
        super().__init__(group_size, count, device, levels, layout.code)
        self._ring = min(layout.ring or group_size, group_size)

    def choose(self, y: Tensor) -> None:
        step = viterbi.rings_at_once(y.device)
        for start in range(0, y.shape[1], step):
            for first in range(0, len(y), self._ring):
                piece = y[first : first + self._ring, start : start + step].contiguous()
                found = viterbi.closest(piece, self._levels, self._code)
                self.codes[first : first + self._ring, start : start + step] = found
        self.centroids.copy_(self._levels[self.codes.int()])


@cache
def trained(bits: int, group_size: int, layout: Layout) -> tuple[float, ...]:
    """Levels by Lloyd's iteration, over sqrt(group_size)."""
    count, generator = 2**bits, torch.Generator().manual_seed(bits)
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / (2 * count) + 0.5
    half = (math.sqrt(3) * 0.8 * torch.special.ndtri(shares)).tolist()
    sums = numbers = torch.zeros(count, dtype=torch.float64)
    for number in range(ROUNDS):
        y = torch.randn(GROUP_OF_GAUSSIANS, GROUPS, generator=generator)
        y /= y.square().sum(0).sqrt()
        levels = tuple(level / math.sqrt(GROUP_OF_GAUSSIANS) for level in symmetric(half))
        rounding = CandidateRounding(GROUP_OF_GAUSSIANS, GROUPS, y.device, levels, layout)
        rounding.choose(y)
        codes = rounding.codes.flatten().long()
        negative = codes < count
        magnitude = torch.where(negative, count - 1 - codes, codes - count)
        new = torch.zeros(count, dtype=torch.float64)
        new.index_add_(0, magnitude, torch.where(negative, -y.flatten(), y.flatten()).double())
        settled = number >= ROUNDS // 2
        sums, numbers = (
            (sums + new if settled else new),
            (numbers if settled else 0) + magnitude.bincount(minlength=count),
        )
        half = (sums / numbers * math.sqrt(GROUP_OF_GAUSSIANS)).sort()[0].tolist()
    return symmetric([float32(level / math.sqrt(group_size)) for level in half])


def feed(block: Tensor, norms: Tensor, upper: Tensor, fmt: TrellisFormat) -> tuple[Tensor, Tensor]:
    """``rings.feed`` in a candidate's layout."""
    assert isinstance(fmt, Candidate)
    count, size, rows = block.shape
    tried, ring = len(norms), min(fmt.layout.ring, size) or 1
    levels = codec.centroids(fmt, block.device)
    rest = block[:, :, None].expand(-1, -1, tried, -1).flatten(2).clone()  # [B, size, X]
    scales = norms.transpose(0, 1).flatten(1)
    codes, errors = torch.empty_like(rest, dtype=torch.uint8), torch.empty_like(rest)
    at_once = max(1, rings._FLOATS[block.device.type] // (2 * fmt.layout.states * ring * count))
    for start in range(0, size, ring):
        stop = start + ring
        mine = upper[:, start:stop, start:stop]
        if fmt.layout.ring:
            for at in range(0, rest.shape[2], at_once):
                some = slice(at, at + at_once)
                codes[:, start:stop, some] = rings.closed(
                    rest[:, start:stop, some].contiguous(), scales[:, some], mine, levels, fmt.layout.code
                )
        else:
            codes[:, start] = down(rest[:, start].unflatten(1, (tried, rows)), norms, levels, fmt.layout.code).flatten(
                1
            )
        left = rest[:, start:stop] - levels[codes[:, start:stop].int()] * scales[:, None]
        errors[:, start:stop] = torch.linalg.solve_triangular(mine.mT, left, upper=False)
        rest[:, stop:] -= upper[:, start:stop, stop:].mT @ errors[:, start:stop]
    shape = (count, size, tried, rows)
    return codes.view(shape).permute(1, 2, 0, 3), errors.view(shape).permute(1, 2, 0, 3)


def down(targets: Tensor, norms: Tensor, levels: Tensor, code: Trellis) -> Tensor:
    """Level indices uint8 [B, tried, N] of one input's targets of that shape, on paths down its rows."""
    count, tried, rows = targets.shape
    scales = norms.transpose(0, 1)
    y = torch.where(scales == 0, 0.0, targets / scales)
    y, weight = (
        torch.nn.functional.pad(t.reshape(-1, rows), (0, -rows % SEGMENT)).view(-1, SEGMENT).t().contiguous()
        for t in (y, scales.square().expand_as(y))
    )
    squares, indices = viterbi.subset_levels(y, levels)
    squares *= weight[:, None]
    taken = torch.empty(SEGMENT, code.states, y.shape[1], dtype=torch.bool, device=y.device)
    none = torch.zeros(y.shape[1], dtype=torch.int64, device=y.device)
    cost = viterbi.walk(viterbi.held(none, code), squares, code, taken)
    path, _ = viterbi.trace(taken, viterbi.first_least(cost))
    before = torch.cat([torch.zeros_like(path[: code.memory]), path])  # state 0, and no ring
    subset = viterbi.subsets(before, code)[code.memory :]
    found = indices.gather(1, subset.long()[:, None]).squeeze(1)
    return found.t().reshape(count, tried, -1)[..., :rows]


@contextmanager
def feeding(layout: Layout | None) -> Iterator[None]:
    """Error feedback by ``feed`` for a candidate. Paths down the rows have one norm tried, and matrices that are better as a whole."""
    if layout is None:
        yield
        return
    more: dict[str, Any] = {} if layout.ring else {"_FEW_SCALES": (1.0,), "_better": _better_as_a_whole}
    with mock.patch.object(rings, "feed", feed), mock.patch.multiple(feedback, **more) if more else nullcontext():
        yield


def _better_as_a_whole(a: feedback._State, b: feedback._State) -> feedback._State:
    take = (b.lost.sum(1) < a.lost.sum(1))[:, None, None]
    pairs = ((a.codes, b.codes), (a.norms, b.norms), (a.left, b.left))
    codes, norms, left = (torch.where(take, y, x) for x, y in pairs)
    return feedback._State(codes, norms, left, torch.where(take[..., 0], b.lost, a.lost))


def gaussian(layout: Layout, bits: int) -> dict[str, float]:
    """Relative squared errors of both efforts."""
    fmt = Candidate(bits, GROUP_OF_GAUSSIANS, layout)
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    return {effort: round(codec.encode(weight, fmt, effort).relative_mse, 5) for effort in ("fast", "best")}


def real(fmt: GroupedFormat, layout: Layout | None, bench: Bench) -> dict[str, Any]:
    """Divergence of the model whose matrices are in a format, calibrated; and their squared error."""
    plan = bench.plan(bits=4, group_size=GROUP, overrides=[("*_proj.weight", fmt.id)])
    options = kappaquant.Options(jobs=1, device=bench.device)
    with feeding(layout):
        folder = kappaquant.quantize(bench.source, bench.work / fmt.id, plan, options, calibration=bench.calibration())
    checkpoint = kappaquant.open_checkpoint(folder)
    packed = {n: checkpoint.dequantize(n) for n in bench.matrices}
    figures = bench.yardstick.read(packed).figures()
    weights = {n: (tensor, 0) for n, tensor in packed.items()}
    kept = {key: figures["kld_nats"][key] for key in ("mean", "interval_95")}
    return {"kld_nats": kept, "weight_error": bench.error(weights)}


def one_layer(bench: Bench, number: int, bits: int, names: list[str]) -> list[dict[str, Any]]:
    """What candidates lose of matrices of a layer under H, as a share of what a codebook of their bits loses; rows and inputs are a part."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(bench.folder, dtype=torch.float32)
    model.to(bench.device)
    layer = model.model.layers[number]
    modules = {"q_proj": layer.self_attn.q_proj, "gate_proj": layer.mlp.gate_proj, "down_proj": layer.mlp.down_proj}
    grams: dict[str, Tensor] = {}
    for name, module in modules.items():

        def see(_: Any, inputs: tuple[Tensor, ...], name: str = name) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])[:, :MOST_INPUTS]
            grams[name] = grams.get(name, 0) + x.t() @ x

        module.register_forward_pre_hook(see)
    with torch.no_grad():
        for window in bench.halves[0][:SEEN]:
            model.model(torch.tensor([window], device=bench.device))
    found = []
    for name, module in modules.items():
        weight = module.weight.detach()[None, :SEGMENT, :MOST_INPUTS]
        lost = {}
        for layout, fmt in {"codebook": CodebookFormat(bits, GROUP), **candidates(bits, names)}.items():
            inputs = feedback.prepare(feedback.rotated(grams[name][None], fmt), GROUP, [name])
            with feeding(LAYOUTS.get(layout)):
                lost[layout] = feedback.encode(weight, fmt, inputs).weighted_errors.sum().item()
            share = round(lost[layout] / lost["codebook"], 4)
            found.append({"layout": layout, "bits": bits, "matrix": name, "of_codebook": share})
    return found


def candidates(bits: int, names: list[str]) -> dict[str, GroupedFormat]:
    """Those of these names, by name."""
    return {name: Candidate(bits, GROUP, LAYOUTS[name]) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--bits", nargs="*", type=int, default=[2, 3, 4], choices=[2, 3, 4])
    parser.add_argument(
        "--text", type=Path, help="of 50,000 tokens or more: measures real weights in place of Gaussian ones"
    )
    parser.add_argument(
        "--folder", type=Path, default=default_folder(None), help="where the model is kept, or was put before"
    )
    parser.add_argument("--layer", type=int, help="of the model: measures three of its matrices in place of the model")
    parser.add_argument("--windows", type=int, default=8, help="of 1,024 tokens, to measure on")
    parser.add_argument(
        "--device", default="cpu", help="where the text is read, and weights are rounded: one, such as cuda:0"
    )
    args = parser.parse_args()
    console, rows = Console(), []
    if args.text is None:
        for name in (n for n in args.layouts if LAYOUTS[n].ring):
            for bits in args.bits:
                rows.append({"layout": name, "bits": bits, **gaussian(LAYOUTS[name], bits)})
                console.print(rows[-1], highlight=False, soft_wrap=True)
        save("trellis_layouts", {"environment": environment(), "group_size": GROUP_OF_GAUSSIANS, "results": rows})
        return
    prepared(args.folder)
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(args.folder, args.text.read_text(encoding="utf-8"), args.windows, Path(work), args.device)
        for bits in args.bits if args.layer is not None else ():
            rows += one_layer(bench, args.layer, bits, args.layouts)
            save(
                "trellis_layouts_layer", {"environment": environment(args.device), "layer": args.layer, "results": rows}
            )
            for name in ("codebook", *args.layouts):
                shares = [row["of_codebook"] for row in rows if (row["layout"], row["bits"]) == (name, bits)]
                console.print(
                    f"{bits} bits, {name}: {sum(shares) / len(shares):.3f} of a codebook's error, {shares}",
                    highlight=False,
                )
        for bits in args.bits if args.layer is None else ():
            formats: dict[str, tuple[GroupedFormat, Layout | None]] = {"codebook": (CodebookFormat(bits, GROUP), None)}
            formats |= {name: (fmt, LAYOUTS[name]) for name, fmt in candidates(bits, args.layouts).items()}
            for name, (fmt, layout) in formats.items():
                register(fmt)
                rows.append({"layout": name, "bits": bits, **real(fmt, layout, bench)})
                console.print(rows[-1], highlight=False, soft_wrap=True)
                save(
                    "trellis_layouts_real",
                    {"environment": environment(args.device), "group_size": GROUP, "results": rows},
                )


if __name__ == "__main__":
    main()
