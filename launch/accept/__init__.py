"""Acceptance on a node with GPUs: the pieces of `benchmarks/gpu_accept.py` (see docs/gpu.md)."""
