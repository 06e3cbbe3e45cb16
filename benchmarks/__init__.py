"""Measurements of normdrop; run them from the repository: ``python -m benchmarks.kernels``."""
