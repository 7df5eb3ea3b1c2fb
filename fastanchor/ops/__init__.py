"""The kernels as operators of torch.library: a CUDA implementation from `fastanchor.kernels`, a CPU one from the reference."""

from fastanchor.ops.supcon import hard_supcon

__all__ = ["hard_supcon"]
