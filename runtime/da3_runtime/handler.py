"""Entry point of the RunPod worker: ``python -m da3_runtime.handler``."""

from __future__ import annotations

import sys

from da3_runtime.serve.runpod_worker import main

if __name__ == "__main__":
    sys.exit(main())
