"""One load in a process of its own: seconds to the first answer, and memory held after each shape.

The parent is :func:`observe`; the child, ``python -m benchmarks.load_once``, imports nothing before
its clock starts. They talk in lines of JSON: the parent sends the contender and the shapes; the child
answers when it has loaded and after the first run of every shape, and then waits, so that the parent
can see how much memory it holds.
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
    """How a load went.

    Attributes
    ----------
    load_s, first_s : float | None
        Seconds from a bare interpreter to a loaded model, imports included, and of the first run on the
        first shape after it.
    memory_mb : dict[Shape, float]
        10^6 bytes held after the first run of each shape, those before it included: on a GPU what the
        process takes of the device, its CUDA context too; on a CPU its anonymous memory.
    why : str | None
        What went wrong with the load.
    """

    load_s: float | None = None
    first_s: float | None = None
    memory_mb: dict[Shape, float] = field(default_factory=dict)
    why: str | None = None

    @property
    def seconds(self) -> float | None:
        """Seconds from a bare interpreter to the first answer."""
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
        Variables set for the process.
    log : Path
        Where its standard error goes.
    occupied_mb : Callable[[int], float]
        Memory that the process of an id takes, 10^6 bytes.
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
            _tell(child.stdin, {"contender": asdict(contender), "shapes": list(shapes)})
            loading.load_s = _answer(child.stdout)["seconds"]
            for shape in shapes:
                seconds = _answer(child.stdout)["seconds"]
                loading.first_s = seconds if loading.first_s is None else loading.first_s
                loading.memory_mb[shape] = occupied_mb(child.pid)
                _tell(child.stdin, {})
        except RuntimeError as error:
            # Without a single answer it is the contender that failed, else one of the shapes.
            loading.why = str(error) if loading.first_s is None else None
        except OSError:
            pass
        finally:
            child.kill()
    if loading.first_s is None and loading.why is None:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        loading.why = f"the process ended with {child.returncode}: {lines[-1] if lines else 'no word'}"
    return loading


def _tell(stream: IO[str], message: dict[str, Any]) -> None:
    print(json.dumps(message), file=stream, flush=True)


def _answer(stream: IO[str]) -> dict[str, Any]:
    line = stream.readline()
    if not line:
        raise BrokenPipeError
    answer: dict[str, Any] = json.loads(line)
    if "why" in answer:
        raise RuntimeError(answer["why"])
    return answer


def main() -> int:
    """The child: load, run, say how long it took, wait for a word, run the next shape."""
    # Libraries print to standard output; the parent must read only what is meant for it.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    task = json.loads(sys.stdin.readline())
    start = time.perf_counter()
    try:
        from benchmarks.contenders import Contender

        loaded = Contender(**task["contender"]).load()
        _tell(channel, {"seconds": time.perf_counter() - start})
        import numpy as np

        for height, width, batch in task["shapes"]:
            images = np.zeros((batch, height, width, 3), np.uint8)
            start = time.perf_counter()
            loaded.run(images)
            _tell(channel, {"seconds": time.perf_counter() - start})
            if not sys.stdin.readline():
                break
    except Exception as error:  # whatever a library raises is the answer
        from benchmarks.record import reason

        _tell(channel, {"why": reason(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
