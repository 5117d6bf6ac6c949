"""The PyTorch network: what the eager backend serves and what the exporter traces.

This is the only part of :mod:`runtime` that imports torch. Load it lazily.
"""

from typing import Any

# One of upstream's modules: they carry no types, so their attributes are whatever they are.
Upstream = Any
