"""What all variants of the real model share: source, text, yardstick, and how a variant becomes a row."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kappaquant
from benchmarks.reference_measure import TextYardstick
from benchmarks.reference_table import formats_of
from kappaquant.files.safetensors import TensorInfo
from kappaquant.formats.kinds import CODEBOOK, TRELLIS_CODE
from kappaquant.planning import profile as scanner
from kappaquant.planning.plan import KEPT, Plan
from kappaquant.planning.sensitivity import Sensitivities
from kappaquant.quantizing.calibration.sensitivity import sensitivities
from kappaquant.quantizing.calibration.text import Calibration
from kappaquant.quantizing.calibration.trials import Trial

WINDOW = 1024
CALIBRATION_WINDOWS = 24
GROUP = 64  # of a row of 576; the usual 128 does not divide it
BOTH = (CODEBOOK, TRELLIS_CODE)
Packed = Mapping[str, tuple[Tensor, int]]  # name -> (dequantized, bytes as stored)
Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One way to quantize the model.

    Attributes:
        name: as the table calls it; group: "kappaquant", "llama.cpp", ...; setting: what it was told, in words.
        make: from what is shared to every tensor that it changes; what it leaves out is counted in 16 bits.
        calibrated: whether it saw the first half of the text.
        plan: what it is quantized by, for those whose divergence the evidence predicts: of kappaquant, and calibrated.
        absent: why it cannot be made here; None if it can.
        took: seconds that making it took, where it is kept between runs.
        kinds: of formats, of which the evidence must be that predicts it.
    """

    name: str
    group: str
    setting: str
    make: Callable[[Bench], Packed]
    calibrated: bool = False
    plan: Callable[[Bench], Plan] | None = None
    absent: Callable[[Bench], str | None] = lambda bench: None
    took: Callable[[Bench], float] | None = None
    kinds: tuple[str, ...] = (CODEBOOK,)


class Bench:
    """The original and the text: its first half to calibrate on, the beginning of its second half to measure on.

    Args:
        folder: of the original.
        text: a long text that the model was not fitted to.
        windows: of 1,024 tokens, to measure on.
        work: for files that a variant writes.
        device: where the text is read, and kappaquant quantizes.
        known: bytes of the rows that have been measured.
    """

    def __init__(
        self, folder: Path, text: str, windows: int, work: Path, device: str = "cpu",
        known: Callable[[], Mapping[str, int]] = dict,
    ) -> None:  # fmt: skip
        self.folder, self.text, self.windows, self.work = folder, text, windows, work
        self.device, self.known = device, known
        self.source = kappaquant.open_source(folder)
        self.infos: Mapping[str, TensorInfo] = self.source.tensors

    @cached_property
    def halves(self) -> tuple[list[list[int]], list[list[int]]]:
        """Windows of the first half, and of the second."""
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)
        return split(tokenizer(self.text)["input_ids"], CALIBRATION_WINDOWS, self.windows)

    @cached_property
    def yardstick(self) -> TextYardstick:
        """Reads the second half; made late, for it takes minutes and gigabytes."""
        return TextYardstick(self.folder, lambda tokenizer: self.halves[1], self.device)

    @cached_property
    def kappa(self) -> dict[str, float]:
        """Excess kurtosis of each matrix."""
        return {name: k for name, k in scanner.scan(self.source, jobs=1).kurtosis().items() if k is not None}

    @cached_property
    def matrices(self) -> tuple[str, ...]:
        """The tensors that every method quantizes: those of the layers' linear maps."""
        plan = kappaquant.make_plan(self.infos, self.source.config, bits=4)
        return tuple(name for name, choice in plan.choices.items() if choice.format != KEPT)

    def plan(self, **options: Any) -> Plan:
        """A plan of the source."""
        return kappaquant.make_plan(self.infos, self.source.config, profile=self.kappa, **options)

    def calibration(self) -> Calibration:
        """The beginning of the first half, as the commands take a text."""
        some = torch.tensor(self.halves[0])
        digest = hashlib.sha256(some.numpy().tobytes()).hexdigest()
        record = {"file": "the first half", "tokens": some.numel(), "window": WINDOW, "tokens_sha256": digest}
        return Calibration(some, record)

    def evidence(self, kinds: tuple[str, ...]) -> Sensitivities:
        """Of the text that rows are calibrated on, kept beside the model (inside, it would pass for a part of it); parts are
        tried in the last of the kinds."""
        letters = "" if kinds == (CODEBOOK,) else f"-{''.join(kinds)}"
        text, path = self.calibration(), self.folder.with_name(f"{self.folder.name}-evidence{letters}.json")
        if path.exists() and text.record.items() <= (found := Sensitivities.load(path)).text.items():
            return found
        trial = Trial(group_size=GROUP, kinds=kinds, kind=kinds[-1])
        found = sensitivities(self.source, text, trial, self.device)
        found.save(path)
        return found

    def weights(self) -> dict[str, Tensor]:
        """The original's matrices, by name, in float32."""
        from safetensors import safe_open

        with safe_open(self.folder / "model.safetensors", "pt") as file:
            return {name: file.get_tensor(name) for name in self.matrices}

    def row(self, variant: Variant) -> Row:
        """Make and measure one variant; a row that says why where it cannot be made."""
        row: Row = {
            "name": variant.name, "group": variant.group, "setting": variant.setting, "calibrated": variant.calibrated
        }  # fmt: skip
        if why := variant.absent(self):
            return {**row, "absent": why}
        start = time.perf_counter()
        packed = variant.make(self)
        made = time.perf_counter()
        seconds = variant.took(self) if variant.took else made - start
        figures = self.yardstick.read({name: tensor for name, (tensor, _) in packed.items()}).figures()
        figures["kld_nats"].pop("by_position", None)
        if variant.plan:
            row["predicted_kld"] = self.evidence(variant.kinds).predicted(formats_of(variant.plan(self)))
        return {
            **row, **sizes(packed, self.infos, self.matrices), "weight_error": self.error(packed), **figures,
            "seconds_to_make": round(seconds, 1), "seconds_to_measure": round(time.perf_counter() - made, 1),
        }  # fmt: skip

    def error(self, packed: Packed) -> float:
        """Squared error of the matrices over their squares."""
        wrong = whole = 0.0
        for name, weight in self.weights().items():
            whole += weight.double().square().sum().item()
            if name in packed:
                wrong += (packed[name][0].float() - weight).double().square().sum().item()
        return wrong / whole


def split(ids: list[int], calibration: int, evaluation: int) -> tuple[list[list[int]], list[list[int]]]:
    """Windows from the start of the first half, and from the start of the second."""
    middle = len(ids) // 2
    if middle < WINDOW * max(calibration, evaluation):
        needed = 2 * WINDOW * max(calibration, evaluation)
        raise SystemExit(f"the text has {len(ids)} tokens, {needed} are needed; name a longer one by --text")
    return tuple(  # type: ignore[return-value]
        [ids[start + i * WINDOW : start + (i + 1) * WINDOW] for i in range(count)]
        for start, count in ((0, calibration), (middle, evaluation))
    )


def sizes(packed: Packed, infos: Mapping[str, TensorInfo], matrices: tuple[str, ...]) -> dict[str, Any]:
    """Bytes and bits per weight of the matrices, and of the whole model; what is not packed counts 2 bytes a value."""
    for name, (tensor, _) in packed.items():
        if name not in infos or tuple(tensor.shape) != infos[name].shape:
            shape = list(infos[name].shape) if name in infos else "no such tensor"
            raise ValueError(f"{name}: {list(tensor.shape)}, the source has {shape}")
    stored = {name: packed[name][1] if name in packed else 2 * info.numel for name, info in infos.items()}
    found: dict[str, Any] = {}
    for what, names in (("matrix", matrices), ("model", tuple(infos))):
        nbytes = sum(stored[name] for name in names)
        found[f"{what}_bytes"] = nbytes
        found[f"{what}_bits_per_weight"] = 8 * nbytes / sum(infos[name].numel for name in names)
    return found


@torch.no_grad()
def mean_squares(bench: Bench) -> dict[str, Tensor]:
    """Of each matrix' inputs over the calibration text, by column: what llama.cpp calls an importance matrix."""
    model, sums, hooks = bench.yardstick.model, dict[str, Tensor](), []

    def collect(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def add(module: Any, inputs: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].flatten(0, -2).double().square().sum(0)

        return add

    for path, module in model.named_modules():
        if f"{path}.weight" in bench.matrices:
            hooks.append(module.register_forward_pre_hook(collect(f"{path}.weight")))
    for window in bench.halves[0]:
        model.model(input_ids=torch.tensor([window], device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: (total / (CALIBRATION_WINDOWS * WINDOW)).float().cpu() for name, total in sums.items()}
