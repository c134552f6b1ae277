"""Former name of ``kappaquant.engines.mlx``."""

from kappaquant.engines.mlx import load, serve

__all__ = ["load", "serve"]
