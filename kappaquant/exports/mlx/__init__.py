"""Folders for stock mlx_lm: affine codes, a rotation folded into the weights."""

from kappaquant.exports.mlx.writer import REPORT_NAME, Options, export_mlx, plan_of

__all__ = ["REPORT_NAME", "Options", "export_mlx", "plan_of"]
