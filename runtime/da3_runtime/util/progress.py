"""Progress of a long run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SECONDS = 10.0  # between plain lines


@contextmanager
def progress(total: int | None, unit: str, is_shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show rate and remaining time of ``total`` steps on stderr.

    The body calls the function with the number of steps since the last call.

    Parameters
    ----------
    total : int | None
        None if it is not known.
    unit : str
        What a step is, such as ``image``.
    """
    from tqdm import tqdm

    if sys.stderr is None or sys.stderr.isatty() or not is_shown:
        with tqdm(total=total, unit=unit, disable=sys.stderr is None or not is_shown) as bar:

            def step(steps: int) -> None:
                bar.update(steps)

            yield step
        return
    start = last = time.monotonic()
    done = 0

    def advance(steps: int) -> None:
        nonlocal last, done
        done += steps
        now = time.monotonic()
        if now - last >= _SECONDS and done != total:
            last, rate = now, done / (now - start)
            of = "" if total is None else f" of {total}"
            left = "" if total is None else f", {tqdm.format_interval((total - done) / rate)} left"
            print(f"{done}{of} {unit}s, {rate:.1f} per second{left}.", file=sys.stderr, flush=True)

    yield advance
