"""Progress of a long run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SECONDS = 10.0  # between plain lines


@contextmanager
def progress(total: int, unit: str, is_shown: bool = True) -> Iterator[Callable[[], None]]:
    """Show rate and remaining time of ``total`` steps on stderr; the body calls the function after each.

    Parameters
    ----------
    unit : str
        What a step is, such as ``image``.
    """
    from tqdm import tqdm

    if sys.stderr is None or sys.stderr.isatty() or not is_shown:
        with tqdm(total=total, unit=unit, disable=sys.stderr is None or not is_shown) as bar:

            def step() -> None:
                bar.update()

            yield step
        return
    start = last = time.monotonic()
    done = 0

    def advance() -> None:
        nonlocal last, done
        done += 1
        now = time.monotonic()
        if now - last >= _SECONDS and done < total:
            last, rate = now, done / (now - start)
            left = tqdm.format_interval((total - done) / rate)
            print(
                f"{done} of {total} {unit}s, {rate:.1f} per second, {left} left.",
                file=sys.stderr,
                flush=True,
            )

    yield advance
