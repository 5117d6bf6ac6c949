"""Serving: request -> image bytes -> RGB -> model input -> raw outputs -> depth -> response.

Nothing here imports :mod:`export`, and importing any module outside :mod:`runtime.eager` loads no
PyTorch.
"""

# The one place that says it; pyproject.toml reads it here.
__version__ = "0.1.0"
