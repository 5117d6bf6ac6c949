"""Imports the RunPod SDK without two dependencies that no worker uses.

The package imports its command line, which imports Paramiko: 23 MB with cryptography and NaCl. Its
debugger asks py-cpuinfo for the processor's name, which takes a second. Empty modules replace both
during the import, so neither needs to be installed.
"""

from __future__ import annotations

import sys
import threading
from types import ModuleType

_lock = threading.Lock()


def import_sdk() -> ModuleType:
    """The package ``runpod``. Call this before any other import of the package."""
    with _lock:
        absent = {"paramiko", "cpuinfo"} - set(sys.modules)
        if "runpod" not in sys.modules:
            for name in absent:
                sys.modules[name] = ModuleType(name)
            # The SDK reads an empty dictionary as an unknown processor.
            sys.modules["cpuinfo"].__dict__.setdefault("get_cpu_info", dict)
        try:
            import runpod
        finally:
            for name in absent:
                sys.modules.pop(name, None)
        module: ModuleType = runpod
        return module
