#!/usr/bin/env python3
"""Depth of a photo from a DA3 endpoint. Needs Python 3.10 or newer and nothing else.

client.py runsync ADDRESS PHOTO [OUT]          one request to a queue endpoint, or to your own server
client.py run ADDRESS PHOTO [OUT]              in two steps: /run, then /status until it is done
client.py load-balancing ADDRESS PHOTO [OUT]   a load-balancing endpoint: waits for /ping first

RUNPOD_API_KEY is the account's key, DA3_API_KEY the worker's; MODEL_ID names another model than
the worker's. The preview is written to OUT, depth.png.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PATHS = {"runsync": "/runsync", "run": "/run", "load-balancing": "/runsync"}
WAITING = ("IN_QUEUE", "IN_PROGRESS", "RUNNING")
# Seconds to wait for a worker to be ready, and for a job to end.
PATIENCE = 600


def ask(url: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """HTTP status and JSON of the response; None if it is not JSON."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("RUNPOD_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    if key := os.environ.get("DA3_API_KEY"):
        headers["da3-api-key"] = key
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=330) as response:
            status, text = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, None


def wait_until_ready(address: str) -> None:
    """Wait until a worker of a load-balancing endpoint has loaded its model."""
    for _ in range(PATIENCE):
        if ask(address + "/ping")[0] == 200:
            return
        time.sleep(1)
    raise SystemExit("error: no worker was ready in time")


def depth(kind: str, address: str, photo: Path) -> dict[str, Any]:
    """The ``output`` of a completed job."""
    data = {"image_base64": base64.b64encode(photo.read_bytes()).decode()}
    if model := os.environ.get("MODEL_ID"):
        data["model_id"] = model
    if kind == "load-balancing":
        wait_until_ready(address)
    elif key := os.environ.get("DA3_API_KEY"):
        data["api_key"] = key  # a queue passes no headers to the worker
    status, job = ask(address + PATHS[kind], {"input": data})
    deadline = time.monotonic() + PATIENCE
    while job and job.get("status") in WAITING and time.monotonic() < deadline:
        time.sleep(0.5)
        status, job = ask(f"{address}/status/{job['id']}")
    if not job or job.get("status") != "COMPLETED":
        raise SystemExit(f"error: HTTP {status}: {(job or {}).get('error') or job}")
    output: dict[str, Any] = job["output"]
    return output


def main() -> None:
    """Read the command line, save the preview, print unit and range."""
    arguments = sys.argv[1:]
    if len(arguments) not in (3, 4) or arguments[0] not in PATHS:
        raise SystemExit(__doc__)
    kind, address, photo = arguments[0], arguments[1].rstrip("/"), Path(arguments[2])
    out = Path(arguments[3] if len(arguments) == 4 else "depth.png")
    output = depth(kind, address, photo)
    if "image_url" in output:  # the response was too large, so the preview is in a bucket
        with urllib.request.urlopen(output["image_url"], timeout=60) as response:
            out.write_bytes(response.read())
    else:
        out.write_bytes(base64.b64decode(output["image_base64"]))
    print(f"{out}: unit {output['unit']}, min {output['min_depth']}, max {output['max_depth']}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(f"error: {error}") from None
