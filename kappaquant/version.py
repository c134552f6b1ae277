"""The version of this package; checkpoints and reports name it."""

__version__ = "0.1.0"
