"""Folders for stock mlx_lm: the norms' gains and a rotation folded into the weights, each module in MLX's affine format."""

from kappaquant.exports.mlx.writer import REPORT_NAME, Options, export_mlx
from kappaquant.exports.weights import plan_of

__all__ = ["REPORT_NAME", "Options", "export_mlx", "plan_of"]
