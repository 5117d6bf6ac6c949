"""What became of a batch, in words."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from da3_runtime.batch.pieces import Done

_KINDS = 10  # of errors, and of warnings, that are named


@dataclass
class Report:
    """Counts of photos by ending, of errors and of warnings.

    Attributes
    ----------
    before : int
        Photos of a folder that earlier runs have done.
    shards_before : int
        Shards that earlier runs have done.
    done : Done
        Sums over all pieces.
    shards : dict[str, str]
        Why shards could not be read to their end, by name.
    start_seconds : float
        How long Ray, its processes and the engine took to start: until the network began.
    """

    before: int = 0
    shards_before: int = 0
    done: Done = field(default_factory=Done)
    shards: dict[str, str] = field(default_factory=dict)
    start_seconds: float = 0.0
    _begun: float = field(default_factory=time.monotonic)

    def add(self, piece: Done) -> None:
        """Add a piece."""
        self.done.photos += piece.photos
        self.done.failed += piece.failed
        self.done.errors += piece.errors
        self.done.warnings += piece.warnings

    @property
    def has_failed(self) -> bool:
        """Whether a photo or a shard failed."""
        return bool(self.done.failed or self.shards)

    def text(self) -> str:
        """Lines for a person."""
        run, failed = self.done.photos.total(), self.done.failed.total()
        seconds = max(time.monotonic() - self._begun - self.start_seconds, 1e-3)
        parts = [f"{run - failed} done"]
        parts += [f"{failed} failed"] if failed else []
        parts += [f"{self.before} done by earlier runs"] if self.before else []
        if self.shards_before:
            parts.append(f"{_count(self.shards_before, 'shard')} done by earlier runs")
        speed = f" in {seconds:.1f} s, {run / seconds:.1f} per second" if run else ""
        first = f"{_count(run, 'photo')}{speed}: {', '.join(parts)}."
        start = f"  Ray, its processes and the engine started in {self.start_seconds:.1f} s."
        lines = [first, start] if self.start_seconds else [first]
        for ending, count in self.done.photos.most_common():
            bad = f", {self.done.failed[ending]} failed" if self.done.failed[ending] else ""
            lines.append(f"  {ending}: {count}{bad}")
        for title, kinds in (("failed", self.done.errors), ("warning", self.done.warnings)):
            lines += [f"  {title}, {count} x: {kind}" for kind, count in kinds.most_common(_KINDS)]
            if len(kinds) > _KINDS:
                lines.append(f"  {title}: {len(kinds) - _KINDS} more kinds")
        for shard, reason in list(self.shards.items())[:_KINDS]:
            lines.append(f"  shard {shard} is not complete; the next run tries again: {reason}")
        if len(self.shards) > _KINDS:
            lines.append(f"  shards that are not complete either: {len(self.shards) - _KINDS}")
        return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
