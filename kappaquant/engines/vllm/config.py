"""The quantization config that vLLM makes of a checkpoint's config.json: which method serves which layer."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex
import torch
from huggingface_hub import snapshot_download
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.checkpoints.kappaquant_v1 import QUANT_METHOD, check_quantization_config
from kappaquant.checkpoints.open import open_checkpoint
from kappaquant.engines.vllm.activations import check_chosen
from kappaquant.engines.vllm.experts import ExpertsMethod
from kappaquant.engines.vllm.linear import EmbeddingMethod, LinearMethod
from kappaquant.errors import FormatError, UnsupportedError
from kappaquant.formats.registry import suffixes
from kappaquant.models.architectures.base import find, union
from kappaquant.models.roles import Role, kind_of
from kappaquant.models.skeleton import meta_model, place_mtp
from kappaquant.runtime.assemble import check_accounting, check_layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger("kappaquant")

# fused layers that some of vLLM's models, such as Qwen3-MoE with dense layers, fail to declare
_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@register_quantization_config(QUANT_METHOD)
class KappaquantConfig(QuantizationConfig):
    """``quantization_config`` of a v1 checkpoint.

    Attributes:
        checkpoint: the open checkpoint (headers only); None until its folder is known.
        names: name in vLLM's model -> name in the checkpoint, before vLLM fuses layers.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__()
        check_quantization_config(content, "config.json")
        self.names = {name: name for name in content["tensors"]}
        self.checkpoint: Checkpoint | None = None
        self._claimed: set[str] = set()
        self._drafting = False  # vLLM builds the model first, then, for speculative decoding, its MTP head

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> KappaquantConfig:
        check_chosen()
        return cls(config)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1  # any GPU: what no kernel of ours takes runs in torch

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def maybe_update_config(
        self, model_name: str, hf_config: PretrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """A folder is checked here, before any process is started; a Hub repository once its files are there."""
        if Path(model_name).is_dir():
            self._open(Path(model_name))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.names = hf_to_vllm_mapper.apply_dict(self.names)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """vLLM asks for it when it begins to load: what is packed must have found a packed layer by now."""
        self._check_claims()
        rules = (_shared() if self._drafting else {}) | _renamed()
        return super().get_checkpoint_weight_mapper() | WeightsMapper(orig_to_new_regex=rules)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        checkpoint = self._opened()
        if (find(checkpoint.config) or union()).mtp_prefix.match(prefix):
            self._begin_drafting()
        if self._drafting and isinstance(layer, VocabParallelEmbedding):
            return None  # once it is loaded, vLLM gives the head the model's own layers in place of these
        if isinstance(layer, RoutedExperts):
            found = {name: stored for name, stored in self.names.items() if name.startswith(f"{prefix}.")}
            if not self._claim(found.values()):
                return None
            below = {name.removeprefix(f"{prefix}."): stored for name, stored in found.items()}
            return ExpertsMethod(checkpoint, below, layer.moe_config)
        head, _, last = prefix.rpartition(".")
        parts = [last] if f"{prefix}.weight" in self.names else (_FUSED | self.packed_modules_mapping).get(last, [last])
        wanted = [f"{head}.{part}.weight" if head else f"{part}.weight" for part in parts]
        names = [self.names[name] for name in wanted if name in self.names]
        if isinstance(layer, VocabParallelEmbedding):
            if isinstance(layer, ParallelLMHead) and not names:  # tied: the embedding's own layer speaks for it
                names = self._embedding()
                return EmbeddingMethod(checkpoint, names, prefix) if self._packed(names) else None
            return EmbeddingMethod(checkpoint, names, prefix) if self._claim(names) else None
        if not isinstance(layer, LinearBase):
            return None
        if not self._claim(names):
            return UnquantizedLinearMethod()
        if len(names) < len(wanted):
            missing = next(name for name in wanted if name not in self.names)
            raise FormatError(f"{missing}: vLLM's layer {prefix} needs it, but {checkpoint.path} does not have it")
        return LinearMethod(checkpoint, names, prefix)

    def _opened(self) -> Checkpoint:
        """The checkpoint of the model that vLLM is building; of a Hub repository, the snapshot that vLLM reads too."""
        if self.checkpoint is None:
            current = get_current_vllm_config()
            folder = snapshot_download(
                current.model_config.model,
                revision=current.model_config.revision,
                cache_dir=current.load_config.download_dir,
                allow_patterns=["*.safetensors", "*.json"],
            )
            self._open(Path(folder))
        assert self.checkpoint is not None
        return self.checkpoint

    def _open(self, folder: Path) -> None:
        """Read the headers, and account for every tensor as loading with transformers does."""
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.keys():
            if (fmt := checkpoint.format_of(name)) and fmt.transposed:
                raise UnsupportedError(
                    f"{name}: is packed as {fmt.id}, for a weight that is stored [..., in, out], which no layer of vLLM's takes; "
                    "plan with --target vllm"
                )
        try:
            model = meta_model(folder)
        except UnsupportedError as problem:
            logger.warning("%s; what vLLM leaves out of %s will not be noticed", problem, folder)
        else:
            check_accounting(model, checkpoint)
        self.checkpoint = checkpoint

    def _packed(self, names: Iterable[str]) -> bool:
        return any(self._opened().format_of(name) is not None for name in names)

    def _claim(self, names: Collection[str]) -> bool:
        """Whether a layer that these tensors fill holds packed weights; if so, they are spoken for."""
        packed = self._packed(names)
        if packed:
            self._claimed.update(names)
        return packed

    def _begin_drafting(self) -> None:
        """Account for every tensor of the MTP head, which transformers does not know and vLLM does not ask for."""
        if self._drafting:
            return
        checkpoint = self._opened()
        self._drafting = True
        if not any(self._role(name) is Role.MTP for name in checkpoint.keys()):
            raise FormatError(
                f"{checkpoint.path}: has no MTP head, by which --speculative-config drafts tokens; quantize a source that "
                "has one (tensors below mtp.), or serve without that option"
            )
        try:
            layout = place_mtp(checkpoint.path, checkpoint.keys())
        except UnsupportedError as problem:
            logger.warning("%s; what vLLM's MTP head leaves out of %s will not be noticed", problem, checkpoint.path)
        else:
            check_layout(layout, checkpoint, "the MTP head, by which --speculative-config drafts,")

    def _check_claims(self) -> None:
        """Raise UnsupportedError for a packed tensor that no packed layer of the model vLLM loads takes."""
        checkpoint = self._opened()
        if get_current_vllm_config().parallel_config.pipeline_parallel_size > 1 and not self._drafting:
            return  # this rank's layers are some of the model's
        for name in checkpoint.keys():
            role = self._role(name)
            # vLLM leaves vision away unless asked for, and the MTP head until the rest is loaded
            built = role is Role.MTP if self._drafting else role not in (Role.MTP, Role.VISION)
            if built and checkpoint.format_of(name) is not None and name not in self._claimed:
                raise UnsupportedError(
                    f"{name}: vLLM's model holds this tensor in a layer that cannot be packed; keep it at 16 bits, "
                    f"as plan does by default"
                )

    def _embedding(self) -> list[str]:
        """The embedding matrix, which a tied head shares."""
        return [name for name in self._opened().keys() if self._role(name) is Role.EMBEDDING]

    def _role(self, name: str) -> Role:
        checkpoint = self._opened()
        return kind_of(name, checkpoint.entry(name).info, checkpoint.config).role


def _shared() -> dict[regex.Pattern[str], str | None]:
    """Parts of a packed embedding or lm_head are not read for an MTP head, which is given the model's own layers."""
    return {regex.compile(rf"(?:^|\.)(?:embed_tokens|lm_head)\.weight{regex.escape(end)}$"): None for end in suffixes()}


def _renamed() -> dict[regex.Pattern[str], str | None]:
    """How the names of parts change on their way into vLLM: see ``linear.endings``."""
    return {regex.compile(rf"{regex.escape(end)}$"): end.replace(".", "_") for end in suffixes()}
