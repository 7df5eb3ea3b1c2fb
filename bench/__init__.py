"""Benchmarks: the naive step, the ladder of stages, the GPU run. Not part of the installed package; run from the repository."""
