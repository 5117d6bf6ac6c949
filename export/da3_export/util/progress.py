"""Progress of long work: a live bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from da3_export.util import interruption

Advance = Callable[[str], None]


@contextmanager
def _bar(text: str, total: int | None, done: int, live: bool) -> Iterator[tqdm]:
    """A progress bar; its clock is updated every second, even between steps."""
    shape = None if total else "{desc} {elapsed}{postfix}"
    ended = threading.Event()
    with tqdm(
        total=total, initial=done, desc=text, bar_format=shape, disable=not live, leave=False
    ) as bar:

        def tick() -> None:
            while not ended.wait(1.0):
                bar.refresh()

        ticker = threading.Thread(target=tick, daemon=True)
        if live:
            ticker.start()
        try:
            yield bar
        finally:
            ended.set()
            if live:
                ticker.join()


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text with aligned columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


class Progress:
    """Numbered steps of one build, on standard error.

    Parameters
    ----------
    title : str
        Name of the build; every line starts with it.
    steps : int
        How many steps there will be.
    """

    def __init__(self, title: str, steps: int) -> None:
        self._title = title
        self._steps = steps
        self._done = 0
        self.seconds: dict[str, float] = {}

    def log(self, message: str) -> None:
        """Print one line, above the live bar if there is one."""
        tqdm.write(f"[{self._title}] {message}", file=sys.stderr)
        sys.stderr.flush()

    @contextmanager
    def step(self, name: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
        """Run the body as one step; it may call the yielded function as its parts finish.

        Parameters
        ----------
        name : str
            Shown at the step's start and end, and the key in :attr:`seconds`.
        total : int | None
            Number of parts, if it is known.
        done : int
            Number of parts that an earlier run has finished.
        """
        interruption.check()
        self._done += 1
        head = f"{self._done}/{self._steps} {name}"
        live = sys.stderr.isatty()
        if not live:
            self.log(f"{head} ...")
        start = time.perf_counter()
        with _bar(f"[{self._title}] {head}", total, done, live) as bar:

            def advance(part: str) -> None:
                interruption.check()
                bar.set_postfix_str(part, refresh=False)
                bar.update()

            yield advance
        interruption.check()
        self.seconds[name] = time.perf_counter() - start
        self.log(f"{head}: {self.seconds[name]:.1f} s")
