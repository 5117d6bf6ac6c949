"""What became of many photos: counts by ending, by error and by warning, and their summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

_KINDS = 10  # of errors, and of warnings, that the summary names


@dataclass
class Tally:
    """Counts of photos.

    Attributes
    ----------
    photos : Counter[str]
        Photos by ending.
    failed : Counter[str]
        Those that failed, by ending.
    errors, warnings : Counter[str]
        Sentences.
    """

    photos: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)

    def count(self, ending: str, error: str | None, warnings: Iterable[str]) -> None:
        """Count a photo by the ending of its name, in lower case, and why it failed if it did."""
        ending = ending or "without an ending"
        self.photos[ending] += 1
        self.warnings.update(warnings)
        if error:
            self.failed[ending] += 1
            self.errors[error] += 1

    def add(self, other: Tally) -> None:
        """Add the counts of other photos."""
        self.photos += other.photos
        self.failed += other.failed
        self.errors += other.errors
        self.warnings += other.warnings

    def speed(self, seconds: float) -> str:
        """Duration and rate as a part of a sentence; empty without photos."""
        run = self.photos.total()
        return f" in {seconds:.1f} s, {run / seconds:.1f} per second" if run else ""

    def described(self) -> list[str]:
        """The counts by ending, then the most frequent errors and warnings, for a person."""
        lines = []
        for ending, count in self.photos.most_common():
            bad = f", {self.failed[ending]} failed" if self.failed[ending] else ""
            lines.append(f"  {ending}: {count}{bad}")
        for title, kinds in (("failed", self.errors), ("warning", self.warnings)):
            lines += [f"  {title}, {count} x: {kind}" for kind, count in kinds.most_common(_KINDS)]
            if len(kinds) > _KINDS:
                lines.append(f"  {title}: {len(kinds) - _KINDS} more kinds")
        return lines


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as ``1 photo`` or ``2 photos``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
