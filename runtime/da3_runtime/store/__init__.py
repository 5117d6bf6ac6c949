"""Engines and checkpoints on disk and on the hub."""
