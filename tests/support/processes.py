"""Processes of the project's commands: a clean environment, runs to the end, servers."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np

import da3_export.settings
import da3_runtime.settings
from tests.support.paths import NANO, ROOT

OPTIONS = {
    variable
    for each in (*da3_runtime.settings.table(), *da3_export.settings.table())
    for variable in each.variables
}
PREFIXES = ("HF_", "DA3_", "RUNPOD_", "BUCKET_", "MAX_", "OUTPUT_")


class ProcessRun(NamedTuple):
    """How a process ended."""

    code: int
    stdout: str
    stderr: str


def command(module: str, *args: str, **env: str) -> list[str]:
    """Command line of one of the project's modules, in this interpreter."""
    return [sys.executable, "-m", module, *args]


def clean_env(**extra: str) -> dict[str, str]:
    """The environment without the project's own settings and engines, with ``extra`` on top.

    Engines run with one thread: other processes of the tests need the cores too.
    """
    ours = {"TARGETS", "IMAGE", "OUT", *OPTIONS}
    kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith(PREFIXES)}
    return kept | {"ENGINE_DIR": str(ROOT / ".cache" / "no-engines"), "THREADS": "1"} | extra


def run_module(
    module: str, *args: str, timeout: float = 300, largest_file: int | None = None, **env: str
) -> ProcessRun:
    """Run one of the project's modules to its end, from the repository root.

    Where ``largest_file`` is given, the system writes no file beyond that many bytes.
    """

    def limit() -> None:
        assert largest_file is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    done = subprocess.run(
        command(module, *args),
        cwd=ROOT,
        env=clean_env(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        preexec_fn=None if largest_file is None else limit,
    )
    return ProcessRun(done.returncode, done.stdout, done.stderr)


def depth_of(output):
    """Depth of an answer with the output ``depth_npz``."""
    with np.load(io.BytesIO(base64.b64decode(output["depth_npz_base64"]))) as arrays:
        return arrays["depth"]


def resident_mb(process="self"):
    """Memory of a process, 2^20 bytes, on Linux."""
    with Path(f"/proc/{process}/statm").open() as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Server:
    """A server process of its own, and a client of it."""

    def __init__(self, *args, **env):
        self.port = int(env.setdefault("PORT", str(free_port())))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "da3_runtime", *args], cwd=ROOT, env=clean_env(MODEL=NANO, **env),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.log = []
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def wait(self):
        """Until it is ready; the health statuses that were seen."""
        seen = []
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                seen.append(self.client.get("/ping").status_code)
            if seen and seen[-1] == 200:
                return seen
            assert self.process.poll() is None, "".join(self.log)
            time.sleep(0.05)
        raise AssertionError("".join(self.log))

    def ask(self, path="/runsync", headers=None, **fields):
        return self.client.post(path, json={"input": fields}, headers=headers)

    def stop(self):
        self.process.terminate()
        assert self.process.wait(60) == 0, "".join(self.log)
