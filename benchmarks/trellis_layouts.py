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
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
from benchmarks.trellis_candidates import GROUP_OF_GAUSSIANS, LAYOUTS, WHOLE, Layout, Rearranged, candidate
from kappaquant.formats import codec, viterbi
from kappaquant.formats.base import EFFORTS
from kappaquant.formats.codebook import CodebookFormat, GroupedFormat
from kappaquant.formats.registry import register
from kappaquant.formats.trellis import Trellis, TrellisFormat
from kappaquant.kernels import dispatch
from kappaquant.quantizing.rounding import feedback, rings

SEGMENT = 128  # rows that a path goes down
SEEN, MOST_INPUTS = 8, 576  # windows of a text, and inputs of a matrix, for what one layer loses


def feed(block: Tensor, norms: Tensor, upper: Tensor, fmt: TrellisFormat) -> tuple[Tensor, Tensor]:
    """``rings.feed`` in a candidate's layout."""
    assert isinstance(fmt, Rearranged)
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
    """Error feedback by ``feed``, in torch, for a candidate that is rearranged; by what the package has for others.

    Paths down the rows have one norm tried, and matrices that are better as a whole.
    """
    if layout is None or layout.ring == WHOLE:
        yield
        return
    more: dict[str, Any] = {} if layout.ring else {"_FEW_SCALES": (1.0,), "_better": _better_as_a_whole}
    torch_only = mock.patch.multiple(dispatch, _TRELLIS_ENCODERS=(), _TRELLIS_FEEDBACKS=())
    patched = mock.patch.multiple(feedback, **more) if more else nullcontext()
    with torch_only, mock.patch.object(rings, "feed", feed), patched:
        yield


def _better_as_a_whole(a: feedback._State, b: feedback._State) -> feedback._State:
    take = (b.lost.sum(1) < a.lost.sum(1))[:, None, None]
    pairs = ((a.codes, b.codes), (a.norms, b.norms), (a.left, b.left))
    codes, norms, left = (torch.where(take, y, x) for x, y in pairs)
    return feedback._State(codes, norms, left, torch.where(take[..., 0], b.lost, a.lost))


def gaussian(layout: Layout, bits: int) -> dict[str, float]:
    """Relative squared errors of both efforts."""
    fmt = candidate(bits, GROUP_OF_GAUSSIANS, layout)
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    with feeding(layout):
        return {effort: round(dispatch.encode(weight, fmt, effort).relative_mse, 5) for effort in EFFORTS}


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
    return {name: candidate(bits, GROUP, LAYOUTS[name]) for name in names}


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
