"""Training: one step, the loop over epochs and stages, checkpoints, and the run directory."""
