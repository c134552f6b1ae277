"""kappaquant: mixed-precision codebook quantization of large language models, bits chosen by evidence."""

__version__ = "0.1.0"
