"""Parses the shapes that benchmarks run on, without a heavy library, whose memory would be measured."""

from __future__ import annotations

from da3_runtime.errors import SettingError
from da3_runtime.variants import MAX_SIDE, MIN_SIDE, PATCH


def positive(option: str, text: str) -> int:
    """Parse the value of an option as a whole number above 0; raises SettingError."""
    if not text.isdecimal() or int(text) == 0:
        raise SettingError(f"{option} {text!r} is not a whole number above 0.")
    return int(text)


def size_of(text: str) -> tuple[int, int]:
    """Parse height and width from ``504x504``; raises SettingError if no network accepts them."""
    height, _, width = text.lower().partition("x")
    sides = (positive("--sizes", height), positive("--sizes", width))
    if any(side % PATCH or not MIN_SIDE <= side <= MAX_SIDE for side in sides):
        raise SettingError(
            f"--sizes {text!r}: height and width must be multiples of {PATCH} "
            f"from {MIN_SIDE} to {MAX_SIDE}."
        )
    return sides
