"""Entry point for RunPod's Hub, which requires this file; same as ``python -m da3_runtime.handler``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "runtime"))

from da3_runtime.handler import main

if __name__ == "__main__":
    sys.exit(main())
