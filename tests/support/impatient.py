"""``python -m tests.support.impatient``: da3-runtime without the waits between huggingface_hub's retries."""

import sys
import time
from types import SimpleNamespace

from huggingface_hub.utils import _http

from da3_runtime.__main__ import main

if __name__ == "__main__":
    vars(_http)["time"] = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    sys.exit(main())
