"""A training step, dense against sparse."""
