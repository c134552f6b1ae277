"""What launches tell kernels of tensors: their dtype, and where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""As numbers.cuh counts them."""


def address(tensor: Tensor | None) -> int | None:
    """Of the first element; None, which kernels read as null, for no tensor."""
    return None if tensor is None else tensor.data_ptr()
