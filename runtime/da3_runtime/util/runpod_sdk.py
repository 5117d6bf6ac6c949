"""The RunPod SDK, imported without two things that no worker uses.

Its command line, which the package imports, imports Paramiko: with cryptography and NaCl 23 MB. And its
debugger asks py-cpuinfo for the processor's name, which takes a second of processes. Empty modules stand
in for both meanwhile, and neither needs to be installed.
"""

from __future__ import annotations

import sys
import threading
from types import ModuleType

_lock = threading.Lock()


def import_sdk() -> ModuleType:
    """The package ``runpod``; to be called before anything of it is imported."""
    with _lock:
        absent = {"paramiko", "cpuinfo"} - set(sys.modules)
        if "runpod" not in sys.modules:
            for name in absent:
                sys.modules[name] = ModuleType(name)
            # The SDK takes an empty answer for an unknown processor.
            sys.modules["cpuinfo"].__dict__.setdefault("get_cpu_info", dict)
        try:
            import runpod
        finally:
            for name in absent:
                sys.modules.pop(name, None)
        module: ModuleType = runpod
        return module
