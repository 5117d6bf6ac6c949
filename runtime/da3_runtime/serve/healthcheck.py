"""Whether this container's worker is well: what the image's HEALTHCHECK runs."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

from da3_runtime.serve.mode import AUTO, PLATFORM_PORT, Mode, find_mode

_HTTP_PORT = "8080"
_SECONDS = 4


def main() -> int:
    """0 when /ping says ready; a queue worker listens nowhere, and is well while it runs."""
    mode = find_mode((os.environ.get("DA3_MODE") or AUTO).lower())
    if mode is Mode.QUEUE:
        return 0
    default = PLATFORM_PORT if mode is Mode.LOAD_BALANCER else _HTTP_PORT
    port = os.environ.get("PORT_HEALTH") or os.environ.get("PORT") or default
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=_SECONDS) as answer:
            return 0 if answer.status == 200 else 1
    except (OSError, urllib.error.HTTPError):
        return 1


if __name__ == "__main__":
    sys.exit(main())
