"""The mathematics in plain eager PyTorch: fp64-capable, readable as a specification, never optimised."""
