"""The curve of a distillation: JSON lines, and the same drawn as SVG."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from da3_runtime.util.files import write_atomically

ENDINGS = (".curve.jsonl", ".curve.svg")
# What is drawn: name in the lines, title, color.
_DRAWN = (
    ("loss", "loss", "#1f5fa8"),
    ("held_out_abs_rel", "AbsRel against the DPT head, on held-out photos", "#b3401a"),
)
_WIDTH, _HEIGHT = 640, 220  # of one drawing, in pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 56, 28  # margins
_LEAST = 1e-6  # on the logarithmic axis

Line = dict[str, float]


class Curve:
    """Writes the curve of a run beside its output.

    Parameters
    ----------
    out : Path
        The run's output: NAME.safetensors gives NAME.curve.jsonl and NAME.curve.svg.
    title : str
        Above the drawing.
    """

    def __init__(self, out: Path, title: str) -> None:
        self._out, self._title = out, title

    @staticmethod
    def paths(out: Path) -> list[Path]:
        """The files beside an output."""
        return [out.with_suffix(ending) for ending in ENDINGS]

    def write(self, lines: Sequence[Line]) -> None:
        """Write both files anew.

        Parameters
        ----------
        lines : Sequence[Line]
            One for each report, with ``step``, ``loss``, its parts, and ``held_out_abs_rel``.

        Raises
        ------
        OSError
            If a file cannot be written.
        """
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        for path, content in zip(self.paths(self._out), (text, draw(lines, self._title)), strict=True):
            write_atomically(path, content.encode())


def draw(lines: Sequence[Line], title: str) -> str:
    """Loss and held-out AbsRel by step, one below the other, on logarithmic axes, as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{2 * _HEIGHT}" '
        f'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for number, (name, label, color) in enumerate(_DRAWN):
        points = [(line["step"], max(line[name], _LEAST)) for line in lines]
        parts.append(
            f'<g transform="translate(0 {number * _HEIGHT})">{_panel(points, label, color)}</g>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _panel(points: Sequence[tuple[float, float]], label: str, color: str) -> str:
    """One drawing; the figures at the axes are those of the first and last step and of full digits."""
    if not points:
        return f'<text x="{_LEFT}" y="{_TOP - 10}">{label}: no figures yet</text>'
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    steps = max(step for step, _ in points)
    values = [value for _, value in points]
    ticks = _ticks(min(values), max(values))
    low, high = math.log(ticks[0]), math.log(ticks[-1])

    def place(step: float, value: float) -> tuple[float, float]:
        share = (math.log(value) - low) / (high - low)
        return _LEFT + (right - _LEFT) * step / steps, bottom - (bottom - _TOP) * share

    drawn = [f'<text x="{_LEFT}" y="{_TOP - 10}" fill="{color}">{label}: {values[-1]:.4g}</text>']
    for tick in ticks:
        _, y = place(0, tick)
        drawn.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        drawn.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    drawn.append(f'<text x="{_LEFT}" y="{bottom + 18}">0</text>')
    drawn.append(f'<text x="{right}" y="{bottom + 18}" text-anchor="end">step {steps:g}</text>')
    track = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    drawn.append(f'<polyline points="{track}" fill="none" stroke="{color}" stroke-width="2"/>')
    x, y = place(*points[-1])
    drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
    return "".join(drawn)


def _ticks(least: float, most: float) -> list[float]:
    """Values of one digit (1, 2 or 5) around and between two values, two at least."""
    first, last = (math.floor(math.log10(value)) for value in (least, most))
    scale = [float(f"{digit}e{power}") for power in range(first, last + 2) for digit in (1, 2, 5)]
    below = max(i for i, value in enumerate(scale) if value <= least)
    above = min(i for i, value in enumerate(scale) if value >= most)
    return scale[below : max(above, below + 1) + 1]
