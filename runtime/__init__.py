"""Serving: request -> image bytes -> RGB -> model input -> raw outputs -> depth -> response.

Nothing here imports :mod:`export`, and importing any module outside :mod:`runtime.eager` loads no
PyTorch.
"""
