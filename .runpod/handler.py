"""The file that RunPod's Hub looks for; the worker is runtime/handler.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from da3_runtime.serve.runpod_worker import main

if __name__ == "__main__":
    sys.exit(main())
