"""What became of a batch, in words."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from da3_runtime.util.tally import Tally, counted

_SHARDS = 10  # that are named


@dataclass
class Report:
    """What became of the photos and the shards.

    Attributes
    ----------
    before : int
        Photos of a folder that earlier runs have done.
    shards_before : int
        Shards that earlier runs have done.
    tally : Tally
        Counts of the photos of all pieces.
    shards : dict[str, str]
        Why shards could not be read to their end, by name.
    start_seconds : float
        How long Ray, its processes and the engine took to start: until the network began.
    """

    before: int = 0
    shards_before: int = 0
    tally: Tally = field(default_factory=Tally)
    shards: dict[str, str] = field(default_factory=dict)
    start_seconds: float = 0.0
    _begun: float = field(default_factory=time.monotonic)

    @property
    def has_failed(self) -> bool:
        """Whether a photo or a shard failed."""
        return bool(self.tally.failed or self.shards)

    def text(self) -> str:
        """Lines for a person."""
        run, failed = self.tally.photos.total(), self.tally.failed.total()
        seconds = max(time.monotonic() - self._begun - self.start_seconds, 1e-3)
        parts = [f"{run - failed} done"]
        parts += [f"{failed} failed"] if failed else []
        parts += [f"{self.before} done by earlier runs"] if self.before else []
        if self.shards_before:
            parts.append(f"{counted(self.shards_before, 'shard')} done by earlier runs")
        first = f"{counted(run, 'photo')}{self.tally.speed(seconds)}: {', '.join(parts)}."
        start = f"  Ray, its processes and the engine started in {self.start_seconds:.1f} s."
        lines = [first, start] if self.start_seconds else [first]
        lines += self.tally.described()
        for shard, reason in list(self.shards.items())[:_SHARDS]:
            lines.append(f"  shard {shard} is not complete; the next run tries again: {reason}")
        if len(self.shards) > _SHARDS:
            lines.append(f"  shards that are not complete either: {len(self.shards) - _SHARDS}")
        return "\n".join(lines)
