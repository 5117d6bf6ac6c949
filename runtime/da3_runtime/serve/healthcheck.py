"""The health check of the container images: asks the server in the same container for /ping."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

from da3_runtime.serve.mode import AUTO, PLATFORM_PORT, Mode, find_mode

_HTTP_PORT = "8080"
_SECONDS = 4


def main() -> int:
    """Exit code 0 if /ping returns 200, else 1. A queue worker has no port: always 0 for it."""
    mode = find_mode((os.environ.get("DA3_MODE") or AUTO).lower())
    if mode is Mode.QUEUE:
        return 0
    default = PLATFORM_PORT if mode is Mode.LOAD_BALANCER else _HTTP_PORT
    port = os.environ.get("PORT_HEALTH") or os.environ.get("PORT") or default
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=_SECONDS) as response:
            return 0 if response.status == 200 else 1
    except (OSError, urllib.error.HTTPError):
        return 1


if __name__ == "__main__":
    sys.exit(main())
