"""kinodit: a trainer for multi-modal diffusion transformers."""

__version__ = "0.1.0"
