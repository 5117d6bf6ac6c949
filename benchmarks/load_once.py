"""Measures one load in a fresh process: seconds to the first result, and memory after each shape.

:func:`observe` runs in the parent. The child, ``python -m benchmarks.load_once``, starts its clock
before it imports anything heavy. They exchange lines of JSON: the parent sends the contender and the
shapes; the child reports after the load and after the first run of each shape, then waits while the
parent reads its memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.contenders import Contender

Shape = tuple[int, int, int]  # height, width, batch


@dataclass
class Loading:
    """Result of a load.

    Attributes
    ----------
    load_s, first_s : float | None
        Seconds from a bare interpreter to a loaded model, imports included, and of the first run after
        it, on the first shape.
    memory_mb : dict[Shape, float]
        Memory after the first run of each shape, in MB (10^6 bytes); the shapes run in order. On a GPU
        it is device memory, the CUDA context included; on a CPU the process's anonymous memory.
    why : str | None
        Reason if the load failed.
    """

    load_s: float | None = None
    first_s: float | None = None
    memory_mb: dict[Shape, float] = field(default_factory=dict)
    why: str | None = None

    @property
    def seconds(self) -> float | None:
        """Seconds from a bare interpreter to the first result."""
        if self.load_s is None or self.first_s is None:
            return None
        return self.load_s + self.first_s


def observe(
    contender: Contender,
    shapes: Sequence[Shape],
    environment: dict[str, str],
    log: Path,
    occupied_mb: Callable[[int], float],
) -> Loading:
    """Load ``contender`` in a fresh process and run every shape once.

    Parameters
    ----------
    environment : dict[str, str]
        Environment variables to add for the process.
    log : Path
        File for its standard error.
    occupied_mb : Callable[[int], float]
        Maps a process id to the memory of the process, in MB (10^6 bytes).
    """
    loading = Loading()
    with (
        log.open("w", encoding="utf-8") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).resolve().parent.parent,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            _send(child.stdin, {"contender": asdict(contender), "shapes": list(shapes)})
            loading.load_s = _receive(child.stdout)["seconds"]
            for shape in shapes:
                seconds = _receive(child.stdout)["seconds"]
                loading.first_s = seconds if loading.first_s is None else loading.first_s
                loading.memory_mb[shape] = occupied_mb(child.pid)
                _send(child.stdin, {})
        except RuntimeError as error:
            # After a first run, only a larger shape failed, not the load.
            loading.why = str(error) if loading.first_s is None else None
        except OSError:
            pass
        finally:
            child.kill()
    if loading.first_s is None and loading.why is None:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        loading.why = (
            f"the process exited with {child.returncode}: {lines[-1] if lines else 'no output'}"
        )
    return loading


def _send(stream: IO[str], message: dict[str, Any]) -> None:
    print(json.dumps(message), file=stream, flush=True)


def _receive(stream: IO[str]) -> dict[str, Any]:
    line = stream.readline()
    if not line:
        raise BrokenPipeError
    message: dict[str, Any] = json.loads(line)
    if "why" in message:
        raise RuntimeError(message["why"])
    return message


def main() -> int:
    """The child: load the contender, then run each shape, report its seconds and wait for the parent."""
    # Libraries print to standard output, so messages go through a duplicate of it and prints to stderr.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    task = json.loads(sys.stdin.readline())
    start = time.perf_counter()
    try:
        from benchmarks.contenders import Contender

        loaded = Contender(**task["contender"]).load()
        _send(channel, {"seconds": time.perf_counter() - start})
        import numpy as np

        for height, width, batch in task["shapes"]:
            images = np.zeros((batch, 1, height, width, 3), np.uint8)
            start = time.perf_counter()
            loaded.run(images)
            _send(channel, {"seconds": time.perf_counter() - start})
            if not sys.stdin.readline():
                break
    except Exception as error:  # any error of a library goes into the report
        from benchmarks.record import reason

        _send(channel, {"why": reason(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
