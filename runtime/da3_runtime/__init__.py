"""Serving: request -> image bytes -> RGB -> model input -> raw outputs -> depth -> response.

Nothing here imports :mod:`export`, and importing any module outside :mod:`da3_runtime.network` loads no
PyTorch.
"""

import os

# From 1.29 on ONNX Runtime's builds for Linux tell their makers of models and machines, and keep an id
# of the machine, unless this is set before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# The one place that says it; pyproject.toml reads it here.
__version__ = "0.2.0"
