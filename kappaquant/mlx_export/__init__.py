"""Folders for stock mlx_lm: the norms' gains and a rotation folded into the weights, each module in MLX's affine format."""

from kappaquant.mlx_export.weights import plan_of
from kappaquant.mlx_export.writer import REPORT_NAME, Options, export_mlx

__all__ = ["REPORT_NAME", "Options", "export_mlx", "plan_of"]
