"""Accuracy on data sets with known depth: every way to run a model, beside PyTorch eager."""

VIEWS = 8  # of a scene, run together for their cameras: as many as a plan runs at once at 504 x 504
