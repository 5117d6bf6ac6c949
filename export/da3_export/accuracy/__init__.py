"""Accuracy on data sets with known depth: every way to run a model, beside PyTorch eager."""
