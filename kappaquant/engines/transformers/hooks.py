"""What transformers 5 calls while ``from_pretrained`` loads a kappaquant checkpoint; importing this module registers it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.checkpoints.kappaquant_v1 import NO_WEIGHTS, QUANT_METHOD, WEIGHTS_KEY, check_quantization_config
from kappaquant.checkpoints.open import open_checkpoint
from kappaquant.checkpoints.side_files import MANIFEST_NAME
from kappaquant.errors import UnsupportedError
from kappaquant.runtime.assemble import Assembler
from kappaquant.runtime.fused.layers import fuse

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(QUANT_METHOD)
class KappaquantConfig(QuantizationConfigMixin):
    """``quantization_config`` of a kappaquant checkpoint, as it stands in config.json.

    Attributes:
        folder: where the checkpoint is, if transformers is not to look for it; never saved.
    """

    def __init__(self, folder: str | None = None, **fields: Any) -> None:
        self.__dict__.update(fields)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers' enum lists only its own methods
        self.folder = folder

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "folder"}


@register_quantizer(QUANT_METHOD)
class KappaquantQuantizer(HfQuantizer):
    """Puts packed modules in place before transformers loads the kept tensors, and fills them afterwards."""

    requires_calibration = True  # transformers then refuses to quantize on the fly: that is ``kappaquant quantize``
    quantization_config: KappaquantConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if places & {"disk"}:
            raise UnsupportedError("device_map: packed weights cannot be offloaded to disk; use CPU or GPU devices")

    def update_tp_plan(self, config: Any) -> Any:  # asked before weights are looked for, by transformers before 5.21
        return _with_weights(config)

    def update_attn_implementation(self, config: Any) -> Any:  # the same, since 5.18
        return _with_weights(config)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self._assembler = Assembler(model, self._open(model, checkpoint_files))
        self._assembler.replace()
        self._declared = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self._assembler.fill()
        # transformers 5.17 leaves kept tensors that it renamed in their stored dtype
        exempt = model._get_dtype_plan(model.dtype)
        for name, parameter in model.named_parameters():
            wanted = self._declared[name]
            if parameter.dtype != wanted and not any(re.search(pattern, name) for pattern in exempt):
                parameter.data = parameter.data.to(wanted)
        del self._assembler, self._declared
        fuse(model)
        return model

    def _open(self, model: PreTrainedModel, checkpoint_files: list[str] | None) -> Checkpoint:
        if self.quantization_config.folder is not None:
            return open_checkpoint(self.quantization_config.folder)
        if not checkpoint_files:
            raise UnsupportedError("a state_dict alone is no kappaquant checkpoint; pass the folder or the Hub id")
        folder = Path(checkpoint_files[0]).parent
        check_quantization_config(self.quantization_config.to_dict(), str(folder / "config.json"))
        repo = str(model.config.name_or_path)
        if not (folder / MANIFEST_NAME).exists() and not Path(repo).is_dir():
            _download_manifest(repo, folder)
        return open_checkpoint(folder)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        raise UnsupportedError(
            "save_pretrained: a loaded kappaquant model cannot be saved again; copy its checkpoint folder instead"
        )

    @property
    def is_trainable(self) -> bool:
        return True  # adapters are; transformers refuses to train a model without them


def _with_weights(config: Any) -> Any:
    """A config by which transformers looks for weights where they are; see ``WEIGHTS_KEY``."""
    if getattr(config, WEIGHTS_KEY, None) == NO_WEIGHTS:
        delattr(config, WEIGHTS_KEY)
    return config


def _download_manifest(repo: str, snapshot: Path) -> None:
    """transformers fetched weights and config of a Hub repository, but not the manifest: take it from the same commit."""
    from huggingface_hub import hf_hub_download

    hf_hub_download(repo, MANIFEST_NAME, revision=snapshot.name, cache_dir=snapshot.parents[2])
