"""Other quantizers on the reference model: what each makes of the weights, and how many bytes that takes.

Every quantizer runs with its own settings; its weights are then taken out by its own dequantization, so that all are judged in
the same float32 model and differ in nothing but the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kappaquant.files.safetensors import TensorInfo

BF16 = torch.bfloat16
EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")


@dataclass(frozen=True)
class Weights:
    """What a quantizer made of a model.

    Attributes:
        tensors: dequantized, by checkpoint name; every other tensor stays as it is.
        nbytes: of all tensors: packed ones with scales, zeros and tables as stored, others in their source's dtype.
        quantized: how many weights are not in 16 bits.
        weights: how many there are.
    """

    tensors: dict[str, Tensor]
    nbytes: int
    quantized: int
    weights: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights

    @classmethod
    def of(cls, packed: Mapping[str, tuple[Tensor, int]], infos: Mapping[str, TensorInfo]) -> Weights:
        """From (dequantized tensor, its packed bytes) by name; ``infos`` are all tensors of the source."""
        for name, (tensor, _) in packed.items():
            if tuple(tensor.shape) != infos[name].shape:
                raise ValueError(f"{name}: {list(tensor.shape)} for {list(infos[name].shape)}")
        kept = sum(info.nbytes for name, info in infos.items() if name not in packed)
        return cls(
            {name: tensor for name, (tensor, _) in packed.items()},
            kept + sum(nbytes for _, nbytes in packed.values()),
            sum(infos[name].numel for name in packed),
            sum(info.numel for info in infos.values()),
        )


class Peer(ABC):
    """A quantizer of ``nn.Linear`` modules.

    Attributes:
        name: as the table calls it; package: what must be installed.
        setting: what it was told, as a user would write it.
    """

    name: str
    package: str
    setting: str

    @property
    def version(self) -> str | None:
        """Of the installed package; None if there is none."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    @abstractmethod
    def load(self, folder: Path) -> nn.Module:
        """The model as a user gets it, in bf16 where it is not quantized."""

    @abstractmethod
    def pack(self, linear: nn.Linear) -> nn.Module:
        """One bf16 linear layer without bias, quantized in the same way."""

    @abstractmethod
    def taken(self, module: nn.Module) -> tuple[Tensor, int] | None:
        """(weight [out, in] that the module computes with, bytes it is stored in); None if it is not quantized."""

    def as_loaded(self, folder: Path) -> dict[str, tuple[Tensor, int]]:
        """Name -> (dequantized, bytes) of what the peer quantizes by itself."""
        found = {f"{path}.weight": self.taken(module) for path, module in self.load(folder).named_modules()}
        return {name: taken for name, taken in found.items() if taken}

    def experts(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
        """The same of fused experts [E, out, in], each matrix quantized as a linear layer of its own."""
        packed = {}
        for name, fused in tensors.items():
            if name.endswith(EXPERTS):
                parts = [self._matrix(name, matrix) for matrix in fused]
                packed[name] = torch.stack([weight for weight, _ in parts]), sum(nbytes for _, nbytes in parts)
        return packed

    def _matrix(self, name: str, matrix: Tensor) -> tuple[Tensor, int]:
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=BF16)
        with torch.no_grad():
            linear.weight.copy_(matrix)
        taken = self.taken(self.pack(linear))
        if taken is None:
            raise ValueError(f"{name}: {self.name} does not quantize a matrix {list(matrix.shape)}")
        return taken


class BitsAndBytes(Peer):
    """NF4 in blocks of 64 with a float32 scale each, as transformers' BitsAndBytesConfig makes it."""

    name, package = "bitsandbytes nf4", "bitsandbytes"
    setting = 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)'

    def load(self, folder: Path) -> nn.Module:
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=BF16)
        return _pretrained(folder, config)

    def pack(self, linear: nn.Linear) -> nn.Module:
        from bitsandbytes.nn import Linear4bit

        module = Linear4bit(
            linear.in_features, linear.out_features, False, BF16, compress_statistics=False, quant_type="nf4"
        )  # as the config: scales are not quantized again
        module.load_state_dict(linear.state_dict())
        return module.to("cpu")  # where it is moved, there it quantizes

    def taken(self, module: nn.Module) -> tuple[Tensor, int] | None:
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Linear4bit

        if not isinstance(module, Linear4bit):
            return None
        stored = module.state_dict()  # codes, scales, table and a description, as save_pretrained writes them
        return dequantize_4bit(module.weight.data, module.weight.quant_state), sum(t.nbytes for t in stored.values())


class Hqq(Peer):
    """HQQ in groups of 64, by its own library: transformers 5.23 refuses HqqConfig ("not available yet")."""

    package = "hqq"

    def __init__(self, bits: int) -> None:
        self.bits, self.name = bits, f"HQQ {bits}-bit"
        self.setting = f"BaseQuantizeConfig(nbits={bits}, group_size=64)"

    def _config(self) -> Any:
        from hqq.core.quantize import BaseQuantizeConfig

        return BaseQuantizeConfig(nbits=self.bits, group_size=64)

    def load(self, folder: Path) -> nn.Module:
        from hqq.models.hf.base import AutoHQQHFModel

        model = _pretrained(folder, None)
        AutoHQQHFModel.quantize_model(model, quant_config=self._config(), compute_dtype=BF16, device="cpu")
        return model

    def pack(self, linear: nn.Linear) -> nn.Module:
        from hqq.core.quantize import HQQLinear

        return HQQLinear(linear, self._config(), compute_dtype=BF16, device="cpu")

    def taken(self, module: nn.Module) -> tuple[Tensor, int] | None:
        from hqq.core.quantize import HQQLinear

        if not isinstance(module, HQQLinear):
            return None
        stored = [module.W_q, *(value for value in module.meta.values() if isinstance(value, Tensor))]
        return module.dequantize(), sum(t.nbytes for t in stored)


class TorchAo(Peer):
    """int4 in groups of 128 for the CPU's int4 product, with a bf16 scale and zero each."""

    name, package = "torchao int4", "torchao"
    setting = "TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=128))"
    #: Its CPU packing wants outputs in multiples of 16; transformers passes over the head by itself only without a list.
    refused = ("lm_head", "in_proj_a.weight", "in_proj_b.weight", "shared_expert_gate.weight")

    def _config(self) -> Any:
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=128, set_inductor_config=False)

    def load(self, folder: Path) -> nn.Module:
        from transformers import TorchAoConfig

        return _pretrained(folder, TorchAoConfig(self._config(), modules_to_not_convert=list(self.refused)))

    def pack(self, linear: nn.Linear) -> nn.Module:
        from torchao.quantization import quantize_

        quantize_(linear, self._config())
        return linear

    def taken(self, module: nn.Module) -> tuple[Tensor, int] | None:
        from torchao.utils import TorchAOBaseTensor

        if not isinstance(module, nn.Linear) or not isinstance(module.weight, TorchAOBaseTensor):
            return None
        packed: Any = module.weight
        nbytes = sum(getattr(packed, name).nbytes for name in packed.tensor_data_names)
        unit = torch.eye(module.in_features, dtype=BF16)  # it has no dequantize: times one, and only zeros are added
        return nn.functional.linear(unit, packed).T.contiguous(), nbytes


PEERS: tuple[Peer, ...] = (BitsAndBytes(), Hqq(4), Hqq(3), TorchAo())


def round_to_nearest(weight: Tensor, bits: int, group_size: int = 128) -> tuple[Tensor, int]:
    """Round to nearest between each group's minimum and maximum: codes, a float16 scale and a zero point of ``bits`` bits.

    Args:
        weight: [..., in], ``in`` a multiple of ``group_size``.

    Returns:
        The dequantized weight in float32, and the bytes of codes, scales and zero points, each packed without a gap.
    """
    groups = weight.float().unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    top = 2**bits - 1
    scale = ((high - low) / top).half().float()
    step = torch.where(scale == 0, 1.0, scale)  # a group of zeros stays zero
    zero = (-low / step).round().clamp(0, top)
    codes = ((groups / step).round() + zero).clamp(0, top)
    stored_bits = weight.numel() * bits + groups.shape[:-1].numel() * (16 + bits)
    return ((codes - zero) * scale).flatten(-2), -(-stored_bits // 8)


def _pretrained(folder: Path, quantization: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=BF16, device_map="cpu", quantization_config=quantization
    )
    return model.eval()
